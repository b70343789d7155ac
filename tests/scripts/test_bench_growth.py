"""scripts/bench_growth.py: its tables say what was measured and what was planned."""

import runpy
import subprocess
from pathlib import Path

import jax
import pytest

from jax_sft.planning import targets
from jax_sft.validate import validate
from scripts import bench_growth, gpu_step
from scripts.bench_growth import BASE, KEPT, Run


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_growth_is_told_against_linear(monkeypatch, capsys):
    def measured(size, num_steps):  # as the square of the tokens, and as all else linearly
        seconds = size.tokens**2 * size.layers * size.vocab * (size.segments + 5) * 1e-12
        return {"fastest_s": seconds, "tokens": size.tokens, "compile_s": 1.0}

    monkeypatch.setattr(bench_growth, "measured", measured)
    assert bench_growth.main(["step"]) == 0
    head, rule, *rows = map(cells, capsys.readouterr().out.splitlines())
    assert len(head) == len(rule) == len(bench_growth.GROWTH_HEAD)
    found = {(name, to): (slower, over) for name, to, _, _, slower, over, _ in rows}
    assert found["tokens of a row, one segment", "1,024"] == ("16.00", "4.00")
    assert found["layers", "16"] == ("16.00", "1.00")
    assert {name for name, _ in found} == set(bench_growth.FACTORS)


def test_what_differs_is_found():
    for name, sizes in bench_growth.FACTORS.items():
        amounts = [bench_growth.amount_of(size, sizes) for size in sizes]
        assert amounts == sorted(set(amounts)), name
        assert all(size.tokens % size.segments == 0 for size in sizes)


def test_every_size_is_a_config_that_can_run(monkeypatch):
    def measured_step(file, num_steps, max_segments):
        cfg = runpy.run_path(str(file))["get_config"]()
        resolved = validate(cfg, jax.device_count())
        dims = resolved.model_cfg.axis_sizes
        return {"tokens": cfg.data.seq_len, "layers": dims["layers"], "vocab": dims["vocab"]}

    monkeypatch.setattr(gpu_step, "measured_step", measured_step)
    for sizes in bench_growth.FACTORS.values():
        for size in sizes:
            found = bench_growth.measured(size, 1)
            wanted = {"tokens": size.tokens, "layers": size.layers, "vocab": size.vocab}
            assert found == wanted


def test_runs_of_one_size_have_the_same_rows_per_gpu(monkeypatch, capsys):
    plans = {8: (1.0, 0.5, 0.1), 64: (1.25, 0.4, 0.2)}

    def planned(run):
        step, mfu, waits = plans[run.num_gpus]
        time = {"exposed_communication_s": waits}
        predicted = {"step_time_s": step, "mfu_causal": mfu, "time": time}
        memory = {"peak_bytes": 2**35, "fits": run.num_gpus == 8}
        total = {"slow_bytes": 2**30}
        return {"memory": memory, "predicted": predicted, "communication_total": total}

    monkeypatch.setattr(bench_growth, "planned", planned)
    monkeypatch.setattr(targets, "plugin_problem", lambda: None)
    runs = (Run("7b", 1, 8, 4, KEPT), Run("7b", 1, 64, 4, KEPT))
    monkeypatch.setattr(bench_growth, "RUNS", runs)
    assert bench_growth.main(["gpus", "--sizes", "7b"]) == 0
    _, _, first, second = map(cells, capsys.readouterr().out.splitlines())
    assert first[:4] == ["7b", "8", "1 x 8", "4"] and first[5] == "32.0"
    assert second[5:] == ["32.0 DOES NOT FIT", "1.0", "16.0%", "1.250 s", "40.0%", "0.80"]


def test_the_base_is_what_the_others_differ_from():
    for sizes in bench_growth.FACTORS.values():
        for size in sizes:
            differing = [n for n in vars(BASE) if getattr(size, n) != getattr(BASE, n)]
            assert set(differing) <= {"tokens", "segments"} or len(differing) == 1


@pytest.mark.slow
@pytest.mark.skipif(targets.plugin_problem() is not None, reason=str(targets.plugin_problem()))
def test_seven_billion_on_64_gpus_are_planned():
    found = bench_growth.planned(Run("7b", 1, 64, 1, KEPT))
    assert "memory" in found and found["memory"]["fits"]
    assert found["target"]["num_devices"] == 64


def test_a_start_is_run_with_empty_caches_and_again_with_full_ones(monkeypatch, capsys):
    runs = []

    def run(command, *, env, **_):
        folder = Path(env["XDG_CACHE_HOME"]).parent
        rows = (folder / "data.jsonl").read_text().splitlines()
        runs.append((command[-1], env["XDG_CACHE_HOME"], len(rows)))
        seconds = {"run0": 9.0, "run1": 4.0}[Path(command[-1]).name]
        line = (
            f"compiled\nstarted in {seconds} s: imports 1.5, data 2.5; of this 0.1 for 2 programs\n"
        )
        return subprocess.CompletedProcess(command, 0, stdout=line)

    monkeypatch.setattr(bench_growth.subprocess, "run", run)
    assert bench_growth.main(["start", "--smoke"]) == 0
    head, _, row = map(cells, capsys.readouterr().out.splitlines())
    assert len(head) == len(row) == len(bench_growth.START_HEAD)
    assert row[3:] == ["9.0 s", "4.0 s", "imports 1.5, data 2.5"]
    (first, cache, num_rows), second = runs
    assert first != second[0] and second[1:] == (cache, num_rows) and num_rows <= 40
