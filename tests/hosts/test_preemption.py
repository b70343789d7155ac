"""Asked to stop: where processes agree to stop, and that a stopped run goes on bitwise."""

import json
import os
import signal
import threading
import time

import pytest

import jax_sft
from jax_sft.hosts import cluster, preemption
from jax_sft.hosts.preemption import Preempted, Preemption
from jax_sft.runtime import lifecycle
from jax_sft.training import metrics


def read_metrics(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


class Fabric:
    """The texts of several processes that live in threads of one."""

    def __init__(self, count, monkeypatch):
        self.texts: dict[str, str] = {}
        self.here = threading.local()
        monkeypatch.setattr(cluster, "num_processes", lambda: count)
        monkeypatch.setattr(cluster, "process_id", lambda: self.here.number)
        monkeypatch.setattr(cluster, "publish", self.texts.__setitem__)
        monkeypatch.setattr(cluster, "check_others", lambda: None)
        monkeypatch.setattr(
            cluster,
            "read_all",
            lambda folder: {k: v for k, v in self.texts.items() if k.startswith(folder + "/")},
        )


@pytest.mark.parametrize("seed", range(6))
def test_all_processes_begin_the_same_number_of_pieces(seed, monkeypatch):
    count, fabric = 3, None
    fabric = Fabric(count, monkeypatch)
    ends, begun = [], [0] * count
    members = [Preemption(end=ends.append) for _ in range(count)]
    stop = threading.Event()

    def beats(number):
        fabric.here.number = number
        while not stop.wait(0.01):
            members[number].beat()

    def loop(number):
        fabric.here.number = number
        members[number].saves_from_here()
        while not members[number].reached():
            # No process is more than three pieces ahead of the slowest, as with collectives.
            while begun[number] >= min(begun) + 3:
                time.sleep(0.0005)
            begun[number] += 1
            time.sleep(0.001 * ((number + seed) % 3))

    threads = [threading.Thread(target=beats, args=(n,)) for n in range(count)]
    loops = [threading.Thread(target=loop, args=(n,)) for n in range(count)]
    for thread in threads + loops:
        thread.start()
    time.sleep(0.05 + 0.01 * seed)
    members[seed % count]._notice("SIGTERM")
    for thread in loops:
        thread.join(timeout=20)
    stop.set()
    for thread in threads:  # or one still beats within the next test, with the fabric of that
        thread.join(timeout=20)
    assert len(set(begun)) == 1 and begun[0] > 3, begun
    assert ends == []


def test_signals_close_together_are_one_and_a_later_one_ends_at_once(monkeypatch):
    ends, now = [], [100.0]
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now[0])
    told = Preemption(end=ends.append)
    told.saves_from_here()
    told._notice("SIGTERM")
    now[0] += 2.9
    told._notice("SIGTERM")
    assert ends == [] and told.reached()
    now[0] += 0.2
    told._notice("SIGUSR1")
    assert ends == [75]


def test_before_the_first_step_there_is_nothing_to_save():
    ends = []
    Preemption(end=ends.append)._notice("SIGTERM")
    assert ends == [75]


def test_handlers_and_the_wake_up_descriptor_are_given_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with Preemption():
        assert [signal.getsignal(n) for n in preemption.SIGNALS] != before
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow  # tests/scripts/test_faults.py has it with two processes
@pytest.mark.parametrize("where", [3, 11])
def test_a_run_told_to_stop_is_saved_and_goes_on_bitwise(make_config, tmp_path, where):
    model = make_config().model.path
    cfg = make_config(model)
    jax_sft.train(cfg, tmp_path / "whole")
    real_add = metrics.Meter.add

    def signal_after(meter, *sums):
        real_add(meter, *sums)
        if meter._step == where:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Meter, "add", signal_after)
        with pytest.raises(Preempted, match="is saved in"):
            jax_sft.train(cfg, tmp_path / "parts")
    assert len(read_metrics(tmp_path / "parts")) in (where, where + 1, where + 2)
    jax_sft.train(cfg, tmp_path / "parts")
    keys = ("step", "loss", "grad_norm", "learning_rate")
    expected, found = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [[m[k] for k in keys] for m in found] == [[m[k] for k in keys] for m in expected]


def test_in_a_program_of_somebody_else_ctrl_c_raises_and_ends_nothing():
    ends = []
    with Preemption(end=ends.append), pytest.raises(KeyboardInterrupt, match="nothing to save yet"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    with Preemption(end=ends.append) as told:
        told.saves_from_here()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.5 * lifecycle.SAME_INTERRUPT_S)
        assert told.reached()
        with pytest.raises(KeyboardInterrupt, match="second time"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    with Preemption(end=ends.append) as told:  # in the last save: the run is done
        told.saves_from_here()
        os.kill(os.getpid(), signal.SIGINT)
        assert told._asked.wait(10)
        told.saves_from_here(False)
        time.sleep(1.5 * lifecycle.SAME_INTERRUPT_S)
        with pytest.raises(KeyboardInterrupt, match="second time"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    with Preemption(end=ends.append) as told, pytest.raises(KeyboardInterrupt, match="is left to"):
        told.saves_from_here()
        told.saves_from_here(False)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert ends == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_is_left_by_an_exception_so_that_its_files_are_removed(number):
    ends = []
    with Preemption(end=ends.append) as told, pytest.raises(Preempted, match="not exported"):
        with told.raising(Preempted("not exported yet")):
            os.kill(os.getpid(), number)
            time.sleep(10)
    assert ends == []
