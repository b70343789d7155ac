"""Real processes that are killed, stopped, asked to stop, or differ: what the others do."""

import dataclasses
import functools
import json
import signal
import socket
import time
from pathlib import Path

import pytest

from jax_sft.runtime import exit_codes
from tests import inputs, programs

CONFIG = """
from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = {model!r}
    cfg.model.dtype = "float32"
    cfg.data.train.main = config.source({data!r})
    cfg.data.seq_len = 128
    cfg.batch.rows = 8
    cfg.train.steps = 14
    cfg.log.every_steps = 1
    cfg.checkpoint.every_steps = 5
    cfg.mesh.cpu_devices = 2
    return cfg
"""
# A trainer that does something at a step: `fault(step, process)` is called before each.
TRAINER = """
import os, signal, sys, time
from jax_sft.training import metrics
from jax_sft import train
from jax_sft.data.batches.loader import Loader
add = metrics.Meter.add
def with_fault(meter, *arguments):
    add(meter, *arguments)
    time.sleep({pace})
    step, process = meter._step, int(os.environ.get("JAX_SFT_PROCESS_ID", 0))
    {fault}
metrics.Meter.add = with_fault
sys.argv[0] = "train"
from absl import app, flags
from jax_sft.runtime import command_line, lifecycle
lifecycle.begin(requeues=True)
command_line.define_config()
flags.DEFINE_string("workdir", "", "")
lifecycle.run(lambda: app.run(train.main, flags_parser=command_line.parse_flags), train.end)
"""


@pytest.fixture(scope="module")
def server():
    with programs.Server("jax_sft.train") as started:
        yield started


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """Return the file of the config of all runs."""
    folder = tmp_path_factory.mktemp("config")
    cfg = inputs.write_config(folder)
    file = folder / "run_config.py"
    file.write_text(CONFIG.format(model=cfg.model.path, data=cfg.data.train.main.path))
    return file


def start_processes(
    server, run_config, folder, count=2, fault="", options=((), ()), pace=0.0, workdir="run", env=()
):
    """Start processes of one run; keywords: the fault, options per process, seconds per step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    trainer = folder / f"{workdir}.trainer.py"
    trainer.write_text(TRAINER.format(fault=fault or "...", pace=pace))
    processes = []
    for number in range(count):
        ours = dict(env[number] if env else {})
        if count > 1:
            ours |= {
                "JAX_SFT_COORDINATOR": f"127.0.0.1:{port}",
                "JAX_SFT_NUM_PROCESSES": str(count),
                "JAX_SFT_PROCESS_ID": str(number),
            }
        arguments = [f"--config={run_config}", f"--workdir={folder / workdir}", *options[number]]
        log = folder / f"{workdir}.{number}.log"
        log.unlink(missing_ok=True)
        processes.append(server.start(trainer, *arguments, output=log, env=ours))
    return processes


@pytest.fixture
def launch(server, run_config, tmp_path):
    """`start_processes` of runs in the folder of the test."""
    return functools.partial(start_processes, server, run_config, tmp_path)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A run of two processes, of which one was stopped (SIGSTOP) after step 12.

    Attributes:
        victim: its number.
        code: exit code of the other one.
        seconds: from the stop to the other one's exit.
        log: what the other one printed.
        losses: of the steps before, which nothing interrupted.
    """

    victim: int
    code: int
    seconds: float
    log: str
    losses: list


@pytest.fixture(scope="module")
def frozen(server, run_config, tmp_path_factory):
    """Return a function from the number of the process that stops to its `Frozen` run."""

    @functools.cache
    def stopped(victim: int) -> Frozen:
        folder = tmp_path_factory.mktemp("frozen")
        fault = f"(process, step) == ({victim}, 12) and os.kill(os.getpid(), signal.SIGSTOP)"
        limit = ("--config.train.stall_timeout_s=5",)
        processes = start_processes(server, run_config, folder, 2, fault, (limit, limit))
        wait_for_step(folder / "run", 11)
        began = time.monotonic()
        code = processes[1 - victim].wait(40)
        seconds = time.monotonic() - began
        processes[victim].send_signal(signal.SIGKILL)
        log = said(folder, 1 - victim)
        return Frozen(victim, code, seconds, log, losses(folder / "run"))

    return stopped


def said(tmp_path, number, workdir="run"):
    return (tmp_path / f"{workdir}.{number}.log").read_text()


def losses(run: Path) -> list:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines if "loss" in m]


def wait_for_step(run: Path, step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and losses(run)[-1:] and losses(run)[-1][0] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def codes(processes, seconds=90):
    return [process.wait(timeout=seconds) for process in processes]


def test_one_process_told_to_stop_stops_both_saved_and_they_go_on_bitwise(launch, frozen, tmp_path):
    # Processes ask each other once a second, and three questions are needed: 3 s, 6 steps of 0.5 s.
    fault = "(process, step) == (1, 7) and os.kill(os.getpid(), signal.SIGTERM)"
    processes = launch(fault=fault, pace=0.5)
    assert codes(processes) == [exit_codes.REQUEUE] * 2, said(tmp_path, 0)
    stored = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit())
    assert stored == losses(tmp_path / "run")[-1][0]
    assert 7 <= stored < 14
    assert codes(launch()) == [0, 0], said(tmp_path, 0)
    whole = frozen(1).losses
    resumed = losses(tmp_path / "run")
    assert [step for step, *_ in resumed] == list(range(1, 15))
    assert resumed[: len(whole)] == whole and len(whole) >= 11


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_process_is_named_by_the_other_within_the_bound(frozen, victim):
    run = frozen(victim)
    assert run.code == exit_codes.LOST, run.log
    assert run.seconds < 5 + 10
    assert f"STOPPED: process {victim} (host " in run.log and "running step" in run.log


@pytest.mark.slow
def test_a_process_that_waits_for_data_is_named_by_both(launch, tmp_path):
    fault = "time.sleep(1000 if (process, step) == (1, 6) else 0)"
    limit = ("--config.train.stall_timeout_s=4",)
    found = codes(launch(fault=fault, options=(limit, limit)))
    assert found == [exit_codes.LOST] * 2
    both = said(tmp_path, 0) + said(tmp_path, 1)
    assert "process 1 (host" in both and " late" in both


def test_an_error_on_one_host_ends_both_with_its_message(launch, tmp_path):
    wrong = ("--config.data.train.main.prompt_key=question",)
    processes = launch(options=((), wrong))
    assert codes(processes) == [exit_codes.USER_ERROR] * 2
    told = said(tmp_path, 0)
    assert "data.train.main.prompt_key of process 1 (host" in told and '"question"' in told
    assert "Traceback" not in told


def test_different_compiler_flags_on_a_host_are_found_before_the_first_collective(launch, tmp_path):
    env = ({}, {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"})
    assert codes(launch(env=env)) == [exit_codes.USER_ERROR] * 2
    assert "the processes differ in environment: XLA_FLAGS of process 1" in said(tmp_path, 0)


@pytest.mark.slow
def test_an_unexpected_exception_on_one_host_ends_both_soon(launch, tmp_path):
    began = time.monotonic()
    found = codes(launch(fault="assert (process, step) != (1, 4), 'surprise'"))
    assert found == [1, 1] and time.monotonic() - began < 60
    assert "process 1 (host" in said(tmp_path, 0) and "surprise" in said(tmp_path, 0)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(launch, tmp_path):
    fault = "step == 6 and (print('it hangs', flush=True), time.sleep(1000))"
    (process,) = launch(count=1, fault=fault, options=((),))
    deadline = time.monotonic() + 90
    while "it hangs" not in said(tmp_path, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == exit_codes.REQUEUE
    assert codes(launch(count=1, options=((),))) == [0]
