"""scripts/gpu_checks.py without a GPU: nothing is lost to a crash or a hang, and all of it runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_sft.nn.layers import INIT_STD
from scripts import gpu_checks, gpu_measure, gpu_step
from tests import programs

REPO = Path(__file__).parents[2]
# A task does what its name says.
FAKE = """
import os, sys, time, json
name, out = sys.argv[1], sys.argv[3]
with open(out, "a") as stream:
    stream.write(json.dumps({"task": name, "found": os.environ.get("XLA_FLAGS", "")}) + "\\n")
if name == "raise":
    raise ValueError("what is wrong")
if name == "abort":
    os.abort()
if name == "hang":
    import subprocess
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_task_that_fails_loses_no_other(tmp_path, monkeypatch, capfd):
    script, out = tmp_path / "fake.py", tmp_path / "out.jsonl"
    script.write_text(FAKE)
    monkeypatch.setattr(gpu_checks, "MEASURE", script)
    monkeypatch.setenv("XLA_FLAGS", "--of_the_caller")
    chosen = [
        gpu_checks.Task(name, "", limit, env)
        for name, limit, env in (
            ("raise", 30, {}),
            ("abort", 30, {}),
            ("hang", 2, {}),
            ("fine", 30, {"XLA_FLAGS": "--of_the_task"}),
        )
    ]
    assert gpu_checks.run_all(chosen, out, budget_s=100, smoke=False) == 1
    found = {row["task"]: row["found"] for row in lines(out) if "found" in row}
    outcomes = {row["task"]: row["outcome"] for row in lines(out) if "outcome" in row}
    assert list(found) == ["raise", "abort", "hang", "fine"]
    assert found["fine"] == "--of_the_caller --of_the_task" and found["raise"] == "--of_the_caller"
    assert outcomes == {
        "raise": "failed with 1: ValueError: what is wrong",
        "abort": "failed with -6: no message",
        "hang": "stopped after 2 s",
        "fine": "ok",
    }
    assert "fine " in capfd.readouterr().out


def test_no_task_starts_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "MEASURE", tmp_path / "missing.py")
    out = tmp_path / "out.jsonl"
    chosen = gpu_checks.tasks()
    assert gpu_checks.run_all(chosen, out, budget_s=0, smoke=False) == 0
    assert [row["outcome"] for row in lines(out)] == ["skipped"] * len(chosen)


def test_every_check_has_a_task_and_a_function():
    assert {task.check for task in gpu_checks.tasks()} == set(gpu_checks.CHECKS)
    assert set(gpu_measure.CHECKS) == set(gpu_checks.CHECKS)
    names = [task.name for task in gpu_checks.tasks()]
    assert len(set(names)) == len(names)


def test_rows_hold_what_they_say():
    segments, positions = gpu_step.rows_of_segments(2, 96)
    assert (segments == 1).all() and (positions == np.arange(96)).all()
    segments, positions = gpu_step.rows_of_segments(1, 96, max_segments=7)
    assert segments.max() == 7 and np.bincount(segments[0])[1:].tolist() == [
        13,
        14,
        14,
        13,
        14,
        14,
        14,
    ]
    segments, positions = gpu_step.rows_of_segments(3, 96, max_segments=256, median=5)
    for ids, places in zip(segments, positions, strict=True):
        starts = np.flatnonzero(places == 0)
        assert (np.diff(ids) >= 0).all() and ids[starts].tolist() == [*range(1, len(starts) + 1)]
        assert (places == np.arange(96) - starts[ids - 1]).all()


def test_random_weights_look_random():
    many = np.asarray(gpu_step.hashed((300, 7, 90), 5, mean=1.0), np.float64)
    assert abs(many.mean() - 1) < 3e-4 and abs(many.std() - INIT_STD) < 3e-4
    unlike = np.corrcoef(many.reshape(300, -1)[::30])
    assert np.abs(unlike - np.eye(10)).max() < 0.15
    assert not np.array_equal(many, gpu_step.hashed((300, 7, 90), 6, mean=1.0))


@pytest.mark.parametrize("task", ["selftest/reference", "attention/reference", "cross_entropy"])
def test_a_check_runs_in_toy_sizes(tmp_path, task):
    out = tmp_path / "out.jsonl"
    assert gpu_measure.main([task, "--out", str(out), "--smoke"]) == 0
    found = lines(out)
    assert len(found) == (
        4 if task.startswith("attention") else 3 if task == "cross_entropy" else 4
    )
    assert all(row["task"] == task and row.get("passed", True) for row in found)


def test_a_wrong_backend_is_a_failure(tmp_path, monkeypatch):
    def wrong(backend, **options):
        raise ValueError(f"{backend} computes wrongly")

    monkeypatch.setattr(gpu_measure.self_test, "self_test", wrong)
    monkeypatch.setattr(gpu_measure, "KINDS", {})
    out = tmp_path / "out.jsonl"
    assert gpu_measure.main(["selftest/blockwise", "--out", str(out), "--smoke"]) == 1
    assert lines(out)[0]["error"] == "blockwise computes wrongly"


def test_a_backend_that_cannot_run_is_skipped(tmp_path):
    out = tmp_path / "out.jsonl"
    for task in ("selftest/cudnn", "attention/tokamax"):
        assert gpu_measure.main([task, "--out", str(out), "--smoke"]) == 0
    assert ["needs an NVIDIA GPU" in row["skipped"] for row in lines(out)] == [True, True]


def test_the_step_is_compared_with_its_prediction(tmp_path, monkeypatch):
    expected = {"peak_bytes": 1000, "step_time_s": 0.5}
    monkeypatch.setattr(gpu_step, "predicted", lambda config_file, folder: expected)
    monkeypatch.setattr(gpu_step, "peak_bytes", lambda: 1100)
    out = tmp_path / "out.jsonl"
    assert gpu_measure.main(["model", "--out", str(out), "--smoke"]) == 0
    predicted, measured, memory, seconds = lines(out)
    assert predicted["predicted"] == expected
    assert 5 < measured["loss"] < 7  # ln 320 = 5.8: random weights know nothing
    assert memory["measured_to_predicted"] == 1.1
    assert seconds["measured_to_predicted"] == measured["step_time_s"] / 0.5


def test_flags_of_the_environment_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1 --xla_gpu_exclude_nondeterministic_ops=true")
    assert gpu_step.options_left("cudnn") == {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_disable_hlo_passes": "rematerialization",
    }
    known = {name for flags in gpu_checks.FLAGS.values() for name in re.findall(r"--(\w+)", flags)}
    monkeypatch.setenv("XLA_FLAGS", "")
    assert set(gpu_step.options_left("cudnn")) <= known  # else the sweep leaves one of them out


def test_the_command_runs(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "scripts.gpu_checks", "--smoke", "--only=versions"]
    env = programs.environment()
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert lines(out)[-1]["outcome"] == "ok" and lines(out)[1]["jax"]
