"""scripts/bench.py: equal work or void, nobody missing in silence, tables of others left alone."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import bench, bench_cases, bench_table
from scripts.peers import contract
from tests import programs

REPO = Path(__file__).parents[2]
HEADER = bench_table.Header(
    case="a",
    title="Case a",
    machine="CPU, 2 cores",
    when="today",
    dtype="float32",
    subjects=("ours", "trl", "torch"),
    labels={"ours": "jax_sft", "trl": "TRL", "torch": "loop"},
    flops=20e9,
    causal_flops=30e9,
    peak_flops=0.0,
    targets={"trl": 3.0},
    floor_target=1.5,
    mfu_target=0.0,
)


def record(subject: str, seconds: float, repeat: int = 0, **changes) -> dict:
    """A run of two timed steps, of 50 tokens each, 20 of which train."""
    found = {
        "case": "a",
        "subject": subject,
        "repeat": repeat,
        "how": "as said",
        "versions": {"lib": "1.0"},
        "step_s": [0.9 * seconds, 1.1 * seconds],
        "losses": [5.0, 4.0, 3.0],
        "tokens": [60, 40],
        "trained": [25, 15],
        "first_step_s": 9.0 - repeat,
        "peak_bytes": 2**30,
        "held_out_before": None if repeat else 5.0,
        "held_out_after": None if repeat else 3.0,
    }
    return found | changes


def line(text: str, label: str) -> str:
    """The table's line of a subject."""
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return found


# ---- the table ---------------------------------------------------------------------------------


def test_figures_are_those_of_the_median_run():
    records = [record("ours", seconds, n) for n, seconds in enumerate((0.3, 0.1, 0.2))]
    text = bench_table.block(HEADER, records)
    cells = [cell.strip() for cell in line(text, "jax_sft").split("|")[2:-1]]
    assert cells == [
        "0.2 (0.1 to 0.3)",
        "250",  # 50 tokens in 0.2 s
        "100",
        "1.00",
        "9.0 s, 7.5 s",  # the first run is cold; 8 and 7 s are warm
        "5.00000, 3.00000",
    ]


def test_a_target_counts_trained_tokens():
    for seconds, verdict in ((0.61, "3.05 times"), (0.59, "2.95 times")):
        text = bench_table.block(HEADER, [record("ours", 0.2), record("trl", seconds)])
        assert f"{verdict} the trained tokens/s of TRL (target: at least 3, " in text
        assert ("NOT MET" in text) == (seconds < 0.6)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"held_out_before": 5.001}, "loss before training 5.00100, ours 5.00000"),
        ({"held_out_after": 3.01}, "loss after training 3.01000, ours 3.00000"),
        ({"held_out_before": float("nan")}, "loss before training nan"),
        ({"held_out_before": None}, "losses were not compared"),
    ],
)
def test_other_work_is_void(changes, reason):
    text = bench_table.block(HEADER, [record("ours", 0.2), record("trl", 0.8, **changes)])
    assert f"VOID: {reason}" in line(text, "TRL")
    assert f"TRL: void, {reason}" in text and "times the trained tokens/s of TRL" not in text


def test_fewer_tokens_are_held_to_the_loss_before_training_only():
    fewer = {"trained": [5, 5], "held_out_after": 4.5}
    text = bench_table.block(HEADER, [record("ours", 0.2), record("trl", 0.8, **fewer)])
    assert "VOID" not in text and "times the trained tokens/s of TRL" in text
    off = record("trl", 0.8, **fewer, held_out_before=5.1)
    assert "VOID" in bench_table.block(HEADER, [record("ours", 0.2), off])


def test_who_failed_or_did_not_run_is_shown_with_the_reason():
    failed = {"case": "a", "subject": "trl", "repeat": 0, "error": "pip | found\nnothing"}
    text = bench_table.block(HEADER, [record("ours", 0.2), failed])
    assert "no figure: pip / found nothing" in line(text, "TRL")
    assert "no figure: not asked for in this run" in line(text, "loop")
    assert "TRL: no figure, so no comparison" in text
    again = bench_table.block(HEADER, [record("ours", 0.2), failed, record("trl", 0.8, 1)])
    assert "a run failed: pip" in line(again, "TRL") or "VOID" in line(again, "TRL")
    alone = bench_table.block(HEADER, [failed])
    assert "our own run has no figure" in alone


def test_the_floor_is_flops_over_the_best_rate_of_jax():
    rates = [
        {"case": "a", "subject": f"matmul/{lib}", "repeat": n, "flops_per_s": rate, "how": "n x n"}
        for n, (lib, rate) in enumerate([("jax", 90e9), ("jax", 100e9), ("torch", 200e9)])
    ]
    assert bench_table.floor_s(20e9, rates) == (0.2, "n x n")
    assert bench_table.floor_s(20e9, []) is None
    text = bench_table.block(HEADER, [*rates, record("ours", 0.28)])
    assert "1.40 times the lean floor of 0.2 s (target: at most 1.5, met)" in text
    assert "20.0 GFLOP" in text and "at 100 GFLOP/s" in text
    assert "2.80 times the 0.1 s at the 200 GFLOP/s of torch's" in text


def test_mfu_is_shown_where_the_peak_is_known():
    header = dataclasses.replace(HEADER, peak_flops=1e12, mfu_target=0.5)
    text = bench_table.block(header, [record("ours", 0.05)])
    assert "60.0%" in line(text, "jax_sft") and "60.0% MFU_c (target: at least 50%, met)" in text


# ---- the file ----------------------------------------------------------------------------------


def test_a_block_is_rewritten_in_its_place_and_others_stay(tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text("# Title\n\nText.\n")
    other = dataclasses.replace(HEADER, machine="GPU")
    bench_table.write(file, HEADER, [record("ours", 0.2)])
    bench_table.write(file, other, [record("ours", 0.4)])
    file.write_text(file.read_text() + "\nAfterwards.\n")
    before = file.read_text()
    bench_table.write(file, HEADER, [record("ours", 0.25)])
    after = file.read_text()
    assert after == before.replace(
        bench_table.block(HEADER, [record("ours", 0.2)]),
        bench_table.block(HEADER, [record("ours", 0.25)]),
    )
    assert after.startswith("# Title\n\nText.\n\n<!-- bench a | CPU, 2 cores -->\n")
    assert after.endswith("<!-- end of bench a | GPU -->\n\nAfterwards.\n")
    assert bench_table.block(other, [record("ours", 0.4)]) in after
    bench_table.write(file, HEADER, [record("ours", 0.2)])
    assert file.read_text() == before


def test_a_block_without_an_end_is_not_written_over():
    start, _ = bench_table.markers("a", HEADER.machine)
    with pytest.raises(ValueError, match="repair the file"):
        bench_table.replace(f"{start}\nmuch text", HEADER, "new")


# ---- the same work for all ---------------------------------------------------------------------


def spec(tmp_path: Path, **changes) -> contract.Spec:
    fields = {field.name: "" for field in dataclasses.fields(contract.Spec)}
    numbers = {"seq_len": 8, "steps": 2, "warmup": 1, "started": 0.0}
    return contract.Spec(**{**fields, **numbers, **changes})  # pyright: ignore


ROW = {
    # Two examples, 5 6 7 (8) and 3 4 (9), then padding; in brackets what only ever is a target.
    "tokens": np.array([5, 6, 7, 3, 4, 0]),
    "targets": np.array([6, 7, 8, 4, 9, 0]),
    "weights": np.array([0, 1, 0, 0, 1, 0]),
    "segment_ids": np.array([1, 1, 1, 2, 2, 0]),
}


def test_labels_are_the_targets_that_train():
    x = contract.IGNORED
    assert list(contract.segments(ROW)) == [([5, 6, 7], [x, x, 7]), ([3, 4, 9], [x, x, 9])]


def test_padding_and_warm_up_do_not_count(tmp_path):
    rows = {name: np.stack([array, array])[:, None] for name, array in ROW.items()}
    rows["weights"][0] = 1
    np.savez(tmp_path / "rows.npz", **rows)
    assert contract.counts(spec(tmp_path, rows=str(tmp_path / "rows.npz"))) == ([5], [2])


def test_the_clock_leaves_out_the_warm_up(tmp_path, monkeypatch):
    times = iter([10.0, 12.0, 13.0, 17.0])
    monkeypatch.setattr(contract.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(contract.time, "time", lambda: 103.0)
    clock = contract.Clock(spec(tmp_path, steps=4, warmup=2, started=100.0))
    for _ in range(3):
        clock.step()
    with pytest.raises(ValueError, match="3 steps ended, 4 were asked for"):
        clock.timed  # noqa: B018
    clock.step()
    assert clock.timed == [1.0, 4.0] and clock.first_step_s == 3.0


def test_the_floor_counts_trained_positions_and_pairs_within_examples(tmp_path):
    raw = bench_cases.QWEN2_15M | {"vocab_size": 100, "num_hidden_layers": 2, "hidden_size": 8}
    raw |= {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rows = {name: array[None, None] for name, array in ROW.items()}
    rows["positions"] = np.array([0, 1, 2, 0, 1, 0])[None, None]
    found = bench_cases.work_of(tmp_path, rows, warmup=0)
    layer = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16  # q, k, v, o; gate, up, down
    pairs = 1 + 2 + 3 + 1 + 2
    attention = 3 * 2 * 2 * 2 * 8 * pairs  # forward and twice that, 2 layers, 2 products, 2 FLOPs
    assert found["flops"] == 6 * (2 * layer * 5 + 100 * 8 * 2) + attention
    assert found["causal_flops"] == 6 * (2 * layer * 5 + 100 * 8 * 5) + attention
    norms = 2 * 2 * 8 + 8
    biases = 2 * (8 + 4 + 4)
    assert found["parameters"] == 2 * layer + 100 * 8 + norms + biases


# ---- the command -------------------------------------------------------------------------------


def test_every_subject_of_a_case_is_known_and_has_its_files():
    for case in bench_cases.CASES.values():
        assert {*case.subjects} <= {*bench.SUBJECTS}
        assert {*case.targets} <= {*case.subjects} and case.warmup < case.steps
    for subject in (bench.SUBJECTS | bench.MATMULS).values():
        assert (bench.PEERS / subject.script).is_file()
        if subject.venv:
            text = (bench.PEERS / f"requirements-{subject.venv}.txt").read_text()
            pins = [line for line in text.splitlines() if not line.startswith("#")]
            assert pins and all("==" in pin for pin in pins)


def test_a_peer_that_cannot_be_installed_is_a_reason(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho tried >> $0.log\necho no registry >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(python))
    pythons = bench.Pythons(tmp_path / "venvs", {})
    found = pythons.of("trl", "cpu")
    assert isinstance(found, bench.Failure)
    assert found.reason.startswith("could not be installed: no registry")
    assert pythons.of("trl", "cpu") is found
    assert (tmp_path / "python.log").read_text() == "tried\n"  # not for every run anew
    assert bench.Pythons(tmp_path, {"trl": Path("/p")}).of("trl", "cpu") == Path("/p")


def test_a_named_interpreter_is_there_and_of_a_peer_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "python").symlink_to(sys.executable)  # as in a virtual environment
    monkeypatch.chdir(tmp_path)
    assert bench.interpreter("trl=python") == ("trl", tmp_path / "python")
    for text in ("trl=nowhere", "trl", "trl=", "none=python"):
        with pytest.raises(argparse.ArgumentTypeError, match="PEER of torch, trl, tunix"):
            bench.interpreter(text)


@pytest.mark.parametrize(
    "body, limit, reason",
    [
        ("print(1); raise ValueError('no such model')", 60, "exit code 1: ValueError: no such"),
        ("print('done')", 60, "printed no result: done"),
        ("import time; time.sleep(60)", 1, "stopped after 1 s"),
    ],
)
def test_a_run_that_fails_is_a_reason(tmp_path, monkeypatch, body, limit, reason):
    (tmp_path / "subject.py").write_text(body)
    monkeypatch.setattr(bench, "PEERS", tmp_path)
    monkeypatch.setattr(bench, "SUBJECTS", {"ours": bench.Subject("", "subject.py")})
    work = bench_cases.Work(spec(tmp_path, device="cpu"), "", 0, 0.0, 0.0)
    options = argparse.Namespace(work=tmp_path, timeout=limit, smoke=False)
    pythons = bench.Pythons(tmp_path, {})
    found = bench.run("a", work, "ours", 0, pythons, options)
    assert found.keys() == {"error"} and found["error"].startswith(reason)


def test_the_command_runs_and_writes_its_table(tmp_path):
    table = tmp_path / "TABLE.md"
    table.write_text("# Speed\n")
    command = [sys.executable, "-m", "scripts.bench", "--smoke", "--repeats=1", f"--table={table}"]
    done = subprocess.run(
        [*command, f"--work={tmp_path / 'work'}"],
        cwd=REPO,
        env=programs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "work").glob("*.jsonl")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [one["subject"] for one in found] == ["matmul/jax", "ours"]
    assert len(found[1]["step_s"]) == 3 and found[1]["held_out_after"] < found[1]["held_out_before"]
    text = table.read_text()
    assert text.startswith("# Speed\n") and "| jax_sft | " in text and "lean floor" in text
