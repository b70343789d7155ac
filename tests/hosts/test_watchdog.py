"""What the watchdog calls a stall, whom it calls late, and what it leaves alone."""

import json
import time

import numpy as np
import pytest

from jax_sft.hosts import cluster, watchdog
from jax_sft.hosts.watchdog import Watchdog
from jax_sft.runtime import exit_codes


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def batches(count, delay_s=0.0):
    for _ in range(count):
        time.sleep(delay_s)
        yield {"tokens": np.zeros((1, 2, 3))}


def test_data_that_does_not_come_ends_the_process_and_says_so(capfd):
    ends = []

    def stuck():
        yield from batches(2)
        wait_for(lambda: ends)

    with Watchdog(0.6, end=ends.append) as watch:
        for batch in watch.batches(stuck(), 1):
            watch.started(batch["tokens"])
            time.sleep(0.1)
    assert ends == [exit_codes.LOST]
    said = capfd.readouterr().err
    assert "waiting for the data of step 3" in said and "test_watchdog.py" in said  # the stacks


def test_slow_phases_and_slow_but_steady_steps_are_left_alone():
    ends = []
    with Watchdog(0.3, end=ends.append) as watch:
        watch.at("loading the weights")
        time.sleep(1.0)
        for batch in watch.batches(batches(4, delay_s=0.25), 1):
            time.sleep(0.9 if watch._step == 1 else 0.0)  # the first one compiles
            watch.started(batch["tokens"])
    assert ends == []


def test_a_new_shape_may_compile_for_long():
    ends = []
    shapes = iter([(1, 2), (1, 2), (1, 4)])
    with Watchdog(0.5, end=ends.append) as watch:
        for batch in watch.batches(({"tokens": np.zeros(shape)} for shape in shapes), 1):
            time.sleep(1.5 if batch["tokens"].shape == (1, 4) else 0.0)
            watch.started(batch["tokens"])
    assert ends == []


def test_timeout_zero_never_ends():
    ends = []
    with Watchdog(0, end=ends.append) as watch:
        watch.at("running step 1", 0.0)
        time.sleep(1.2)
    assert ends == []


def test_the_status_file_tells_phase_and_step(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_SFT_STATUS", str(tmp_path / "status"))
    with Watchdog(60) as watch:
        watch.joined()
        for batch in watch.batches(batches(3), 5):
            watch.started(batch["tokens"])
    told = json.loads((tmp_path / "status").read_text())
    assert told["step"] == 7 and told["joined"] and abs(told["time"] - time.time()) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["status"]


# ---- several processes, as the first of three sees them ------------------------------------------


@pytest.fixture
def three(monkeypatch):
    texts: dict[str, str] = {}
    monkeypatch.setattr(cluster, "num_processes", lambda: 3)
    monkeypatch.setattr(cluster, "process_id", lambda: 0)
    monkeypatch.setattr(cluster, "hosts", lambda: ("a", "b", "c"))
    monkeypatch.setattr(cluster, "name", lambda n: f"process {n} (host {'abc'[n]})")
    monkeypatch.setattr(cluster, "publish", texts.__setitem__)
    monkeypatch.setattr(
        cluster, "read_all", lambda folder: {k: v for k, v in texts.items() if folder in k}
    )
    monkeypatch.setattr(cluster, "say_goodbye", lambda *_: None)
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    return texts


def state(count, step, phase="running step 4"):
    return json.dumps({"phase": phase, "for_s": 9, "step": step, "done": 3, "count": count})


@pytest.mark.parametrize("silent", [1, 2])
def test_a_process_that_is_not_heard_of_is_named(three, silent, capfd):
    ends = []
    with Watchdog(0.8, end=ends.append) as watch:
        watch.joined()
        began = time.monotonic()
        for count in range(100):
            three[f"beat/{3 - silent}"] = state(count, 4)
            if count < 5:
                three[f"beat/{silent}"] = state(count, 4)
            if ends:
                break
            time.sleep(0.05)
    assert ends == [exit_codes.LOST] and 0.8 < time.monotonic() - began < 3
    said = capfd.readouterr().err
    assert f"STOPPED: process {silent} (host {'abc'[silent]}) sent no sign of life" in said


@pytest.mark.parametrize(
    "theirs, late",
    [
        ((4, "running step 4", 3, "waiting for the data of step 4"), "process 2 (host c) late"),
        ((4, "running step 4", 4, "running step 4"), "all processes hang within step 4"),
        ((3, "evaluating", 4, "running step 4"), "process 1 (host b) late"),
    ],
)
def test_the_late_process_is_the_one_that_the_others_wait_for(three, theirs, late, capfd):
    ends = []
    with Watchdog(0.5, end=ends.append) as watch:
        watch.joined()
        watch._step = 4
        watch.at("running step 4", 0.5)
        for count in range(100):
            three["beat/1"], three["beat/2"] = state(count, *theirs[:2]), state(count, *theirs[2:])
            if ends:
                break
            time.sleep(0.05)
    assert ends == [exit_codes.LOST]
    assert f"STOPPED: {late}" in capfd.readouterr().err


def test_another_process_that_says_why_it_ends_ends_this_one_with_its_code(three, capfd):
    ends = []
    with Watchdog(60, end=ends.append) as watch:
        watch.joined()
        three["goodbye/2"] = "64 ValueError: no such file"
        assert wait_for(lambda: ends)
    assert ends == [64]
    assert "process 2 (host c) ended: ValueError: no such file" in capfd.readouterr().err
