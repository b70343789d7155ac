"""The launcher without a cluster: who am I, what would run where, and what a supervisor does.

Trainers are stand-ins: small programs that end, hang or ignore signals as told. The real engines
are in scripts/faults.
"""

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_sft import launch
from jax_sft.launching import coordinates, environment, gpus, processes
from jax_sft.launching.coordinates import Coordinates
from jax_sft.launching.local import restarts
from jax_sft.launching.remote import ray_cluster, ssh
from jax_sft.runtime import exit_codes

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch.sh"
# Recorded from srun of Slurm 22.05: task 1 of 3, the second on the first of two nodes.
SLURM = {
    "SLURM_JOB_ID": "23917",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}
# Recorded in the batch script of a job with two nodes: a task number, but no step.
SLURM_BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
# Recorded from mpirun of Open MPI 4.1, rank 1 of 2 on one machine.
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1865482240.0;tcp://192.0.2.2:59607;tcp6://[fd00::2]:60003",
    "PMIX_NAMESPACE": "1865482241",
    "PMIX_RANK": "1",
}
# Open MPI 5 promises these (docs.open-mpi.org, "Environment variables set for MPI applications").
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-7@1",
}
BY_HAND = {
    "JAX_SFT_COORDINATOR": "run-workers-0-0.run:29400",
    "JAX_SFT_NUM_PROCESSES": "4",
    "JAX_SFT_PROCESS_ID": "3",
}


# ---- who am I -----------------------------------------------------------------------------------


def test_a_slurm_task_knows_its_number_and_the_first_node():
    found = coordinates.find(SLURM, nproc=1)
    assert found == Coordinates("Slurm", 3, 1, "n1:13917", 2, 1)
    found = coordinates.find(SLURM, nproc=4)
    assert (found.num_processes, found.first_process) == (12, 4)
    assert coordinates.find(SLURM, 1, port=1234).address == "n1:1234"
    assert coordinates.find(SLURM, 1, coordinator="other:99").address == "other:99"


def test_slurm_tasks_on_one_node_meet_on_loopback_and_a_single_task_meets_nobody():
    one_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_STEP_NODELIST": "n1"}
    assert coordinates.find(one_node, 1).address == "127.0.0.1:13917"
    single = one_node | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    single["SLURM_STEP_TASKS_PER_NODE"] = "1"
    assert coordinates.find(single, 1) == Coordinates("Slurm", 1, 0, None)


@pytest.mark.parametrize("step", [None, str(2**32 - 5), str(2**32 - 6)])
def test_a_batch_script_or_shell_without_srun_is_refused_with_the_remedy(step):
    environ = SLURM_BATCH | ({"SLURM_STEP_ID": step} if step else {})
    with pytest.raises(ValueError, match=r"2 nodes.*srun scripts/launch.sh"):
        coordinates.find(environ, 1)
    one_node = environ | {"SLURM_JOB_NUM_NODES": "1"}
    assert coordinates.find(one_node, 1).engine == "this machine"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("node001,node002", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[007,009-015]", "node007"),
        ("a[3-5]b[1-2]c,d", "a3b1c"),
        ("gpu-7.cluster.org,x", "gpu-7.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list_is_found(nodes, first):
    assert coordinates.first_host(nodes) == first


def test_a_node_list_that_is_not_understood_is_refused():
    for nodes in ("", "[1-2", "a b"):
        with pytest.raises(ValueError, match="--coordinator"):
            coordinates.first_host(nodes)


def test_open_mpi_ranks_know_themselves():
    found = coordinates.find(OPEN_MPI_4, 1)
    assert (found.engine, found.num_processes, found.first_process) == ("Open MPI", 2, 1)
    assert (found.local_launchers, found.local_launcher) == (2, 1)
    host, port = str(found.address).split(":")
    assert host == "127.0.0.1" and 10_000 <= int(port) < 30_000
    assert coordinates.find(OPEN_MPI_4, 1) == found  # all ranks come to the same port
    other_job = OPEN_MPI_4 | {"PMIX_NAMESPACE": "1865547777"}
    assert coordinates.find(other_job, 1).address != found.address


def test_open_mpi_on_several_hosts_meets_where_mpirun_is_or_asks():
    two_hosts = OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert str(coordinates.find(two_hosts, 1).address).startswith("192.0.2.2:")
    with pytest.raises(ValueError, match="--coordinator=HOST:PORT"):
        coordinates.find(OPEN_MPI_5, 1)
    assert coordinates.find(OPEN_MPI_5, 1, "h1:29400").address == "h1:29400"
    in_slurm = OPEN_MPI_5 | SLURM_BATCH
    assert str(coordinates.find(in_slurm, 1).address).startswith("n1:")


def test_mpirun_within_slurm_is_open_mpi():
    # Open MPI starts its daemons with srun: their variables are inherited.
    assert coordinates.find(SLURM | OPEN_MPI_4, 1).engine == "Open MPI"


def test_variables_set_by_hand_come_first_and_are_all_needed():
    found = coordinates.find(SLURM | OPEN_MPI_4 | BY_HAND, 1)
    assert found == Coordinates("JAX_SFT_* set manually", 4, 3, "run-workers-0-0.run:29400")
    with pytest.raises(ValueError, match="JAX_SFT_NUM_PROCESSES"):
        coordinates.find({"JAX_SFT_COORDINATOR": "h:1", "JAX_SFT_PROCESS_ID": "0"}, 1)
    with pytest.raises(ValueError, match="beyond"):
        coordinates.find(BY_HAND, 2)
    with pytest.raises(ValueError, match="not HOST:PORT"):
        coordinates.find(BY_HAND | {"JAX_SFT_COORDINATOR": "h"}, 1)


def test_local_processes_meet_at_a_free_port_outside_the_kernels_range():
    assert coordinates.find({}, 1) == Coordinates("this machine", 1, 0, None)
    found = coordinates.find({}, 2)
    host, port = str(found.address).split(":")
    assert host == "127.0.0.1" and 10_000 <= int(port) < 30_000
    assert coordinates.is_free(int(port))


# ---- GPUs and environment -----------------------------------------------------------------------


@pytest.fixture
def eight_gpus(tmp_path, monkeypatch):
    """A machine on which nvidia-smi lists eight GPUs."""
    lines = "\n".join(f"GPU {n}: NVIDIA H200 (UUID: GPU-{n})\n  MIG 1g Device 0:" for n in range(8))
    program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def devices(where: Coordinates, nproc: int, environ=None) -> list[str | None]:
    found = processes.plan(where, nproc, ["train"], environ or {})
    return [process.variables.get(gpus.VARIABLE) for process in found]


def test_gpus_are_divided_over_the_processes_of_a_machine(eight_gpus):
    assert devices(Coordinates("", 1, 0, None), 1) == [None]  # one process drives all
    assert devices(Coordinates("", 2, 0, "h:1"), 2) == ["0,1,2,3", "4,5,6,7"]
    third_of_four = Coordinates("", 8, 4, "h:1", local_launchers=4, local_launcher=2)
    assert devices(third_of_four, 1) == ["4,5"]
    assert devices(third_of_four, 2) == ["4", "5"]
    assert devices(Coordinates("", 2, 1, "h:1"), 1) == [None]  # one process on each of two hosts
    with pytest.raises(ValueError, match=r"8 GPUs.*3 processes.*\[1, 2, 4, 8\]"):
        devices(Coordinates("", 3, 0, "h:1"), 3)


def test_only_visible_gpus_are_divided(eight_gpus):
    two = Coordinates("", 2, 0, "h:1")
    assert devices(two, 2, {"CUDA_VISIBLE_DEVICES": "4,5"}) == ["0", "1"]
    assert devices(two, 2, {"JAX_SFT_LOCAL_DEVICE_IDS": "2,6"}) == ["2", "6"]
    assert devices(two, 2, {"CUDA_VISIBLE_DEVICES": ""}) == [None, None]
    assert devices(two, 2, {"JAX_PLATFORMS": "cpu"}) == [None, None]
    bound = {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "4,5"}
    assert devices(Coordinates("", 2, 1, "h:1", 2, 1), 1, bound) == [None]


def test_a_failing_nvidia_smi_is_an_error(tmp_path, monkeypatch):
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="nvidia-smi"):
        gpus.visible({})


def test_what_is_set_already_is_never_overridden():
    assert environment.settings({}, None)["NCCL_DEBUG"] == "WARN"
    assert "NCCL_DEBUG" not in environment.settings({"NCCL_DEBUG": "INFO"}, None)
    shown = environment.describe({"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret"}, None)
    assert any("set before: NCCL_DEBUG=INFO" in line for line in shown)
    assert "secret" not in "".join(shown)


def test_the_way_to_the_coordinator_leads_around_a_proxy():
    proxy = {"https_proxy": "http://proxy:3128", "no_proxy": "a,b"}
    assert environment.settings(proxy, "h1:29400")["no_grpc_proxy"] == "h1,a,b"
    assert "no_grpc_proxy" not in environment.settings({}, "h1:29400")
    assert "no_grpc_proxy" not in environment.settings(proxy, None)
    assert "no_grpc_proxy" not in environment.settings(proxy | {"no_grpc_proxy": "x"}, "h1:1")


# ---- what would run where -----------------------------------------------------------------------


def run_launch(*arguments: str, cwd=ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run scripts/launch.sh with a clean environment and these variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [LAUNCH, *arguments],
        cwd=cwd,
        env=kept | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(*arguments: str, **variables: str) -> str:
    done = run_launch("--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run_here_prints_every_process_as_a_command_that_can_be_pasted():
    out = dry_run("--nproc=2", "--config=my config.py", "--port=29999", JAX_PLATFORMS="cpu")
    lines = [line for line in out.splitlines() if line.startswith("env ")]
    for number, line in enumerate(lines):
        words = shlex.split(line)
        assert words[-4:] == [sys.executable, "-m", "jax_sft.train", "--config=my config.py"]
        assert f"JAX_SFT_PROCESS_ID={number}" in words and "JAX_SFT_NUM_PROCESSES=2" in words
        assert "JAX_SFT_COORDINATOR=127.0.0.1:29999" in words and "NCCL_DEBUG=WARN" in words
    assert len(lines) == 2


def test_a_dry_run_in_slurm_open_mpi_and_by_hand_says_what_was_found():
    assert "Slurm: process 1 of 3, meeting at n1:13917" in dry_run("--config=x", **SLURM)
    assert "Open MPI: process 1 of 2" in dry_run("--config=x", **OPEN_MPI_4)
    assert "process 3 of 4, meeting at run-workers" in dry_run("--config=x", **BY_HAND)
    forgotten = run_launch("--dry-run", "--config=x", **SLURM_BATCH)
    assert forgotten.returncode == 64 and "srun" in forgotten.stderr


def test_a_dry_run_of_hosts_prints_one_ssh_each_with_its_coordinates():
    out = dry_run("--hosts=me@h1,h2", "--nproc=2", "--config=x", "--ssh=ssh -p 2222", "--grace=9")
    for number, line in enumerate(out.splitlines()):
        host, _, command = line.partition(": ")
        words = shlex.split(command)
        assert words[:3] == ["ssh", "-p", "2222"] and words[-3:-1] == ["--", host]
        assert "BatchMode=yes" in words and "ServerAliveInterval=15" in words
        there = shlex.split(words[-1])
        assert there[:4] == ["cd", str(ROOT), "&&", "exec"] and str(LAUNCH) in there
        assert "JAX_SFT_COORDINATOR=h1:29400" in there and "JAX_SFT_NUM_PROCESSES=4" in there
        assert f"JAX_SFT_PROCESS_ID={2 * number}" in there
        assert {"--nproc=2", "--grace=9.0", "--config=x", "--leash"} < set(there)
        assert not [word for word in there if word.startswith(("--hosts", "--ssh", "--dry"))]
    assert number == 1


def test_blanks_and_quotes_reach_the_other_host_as_they_are(tmp_path):
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    (host,) = ssh.commands(
        ["h1"],
        ["--config=a b.py", "--x=$(date)'\"*"],
        nproc=1,
        address="h1:1",
        ssh=["ssh"],
        launcher=["/opt/my project/scripts/launch.sh"],
        folder=folder,
        environ={"PYTHON": "/a b/python", "WANDB_API_KEY": "secret", "NCCL_DEBUG": "INFO"},
    )
    there = (
        host.command[-1]
        .replace("exec env", "env -0")
        .replace(
            shlex.quote("/opt/my project/scripts/launch.sh"),
            'sh -c \'pwd; printf "%s\\n" "$@"; env\' sh',
        )
        .replace("env -0", "env")
    )
    done = subprocess.run(["sh", "-c", there], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:4] == [str(folder), "--leash", "--config=a b.py", "--x=$(date)'\"*"]
    assert "PYTHON=/a b/python" in lines and "NCCL_DEBUG=INFO" in lines
    assert "secret" not in host.command[-1]  # every user of a host can read command lines


def test_a_dry_run_of_ray_prints_every_node_and_needs_no_ray():
    out = dry_run("--ray=auto", "--nodes=2", "--config=x", "--python=/trainers/python")
    first, second = out.splitlines()
    assert first.startswith("node 0: env ") and "JAX_SFT_PROCESS_ID=0" in first
    assert "JAX_SFT_PROCESS_ID=1" in second and "JAX_SFT_NUM_PROCESSES=2" in second
    assert "--python=/trainers/python --config=x" in second
    missing = run_launch("--ray=auto", "--config=x")
    assert missing.returncode == 64 and "--nodes" in missing.stderr


def test_a_missing_ray_is_one_line_that_says_where_to_put_it():
    with pytest.raises(ValueError, match=r"--ray needs the package ray.*--python"):
        ray_cluster.load()
    done = run_launch("--ray=auto", "--nodes=1", "--config=x")
    assert done.returncode == 64 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nproc=0", "--config=x"],
        ["--nproc=two", "--config=x"],
        ["--hosts=h1,,h2", "--config=x"],
        ["--hosts=h1,-oProxyCommand=evil", "--config=x"],
        ["--hosts=h1", "--ray=auto", "--config=x"],
        ["--grace=-1", "--config=x"],
        ["--program=rm", "--config=x"],
        ["--nproc=2", "--coordinator=nowhere", "--config=x"],
        [],
    ],
)
def test_a_wrong_command_line_is_a_users_error(arguments):
    done = run_launch(*arguments)
    assert done.returncode == 64
    assert "Traceback" not in done.stderr and done.stderr and not done.stdout


def test_what_the_launcher_does_not_know_goes_to_the_trainer():
    options, rest = launch.parser().parse_known_args(
        ["--config=x", "--nproc=3", "--config.batch.rows=8", "--nprocs=2", "--workdir", "a b"]
    )
    assert options.nproc == 3
    assert rest == ["--config=x", "--config.batch.rows=8", "--nprocs=2", "--workdir", "a b"]


def test_help_comes_at_once_and_without_jax():
    began = time.monotonic()
    done = run_launch("--help")
    assert done.returncode == 0 and "--max-restarts" in done.stdout
    assert time.monotonic() - began < 2
    code = "import sys, jax_sft.launch; sys.exit(bool({'jax', 'numpy', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- what follows from how an attempt ended -----------------------------------------------------


def test_who_says_why_comes_before_who_only_noticed():
    assert restarts.first_error([(0, 0), (1, 0)]) is None
    assert restarts.first_error([(1, -6), (0, 64)]) == (0, 64)
    assert restarts.first_error([(0, 76), (1, -9)]) == (1, -9)
    assert restarts.first_error([(0, 76), (1, -6)]) == (0, 76)
    assert restarts.first_error([(0, 75), (1, 65)]) == (1, 65)
    assert restarts.first_error([(0, 0), (1, 1)]) == (1, 1)


def test_after_a_request_to_stop_what_was_cut_short_is_queued_again():
    assert restarts.after_stop([0, 0]) == 0
    assert restarts.after_stop([0, 75]) == 75
    assert restarts.after_stop([1, 75]) == 75
    assert restarts.after_stop([-15, -9, 76]) == 75
    assert restarts.after_stop([64, -15]) == 64


def test_codes_are_those_of_a_shell_and_never_sshs():
    assert [restarts.for_the_shell(code) for code in (0, 75, -9, 255)] == [0, 75, 137, 1]


def failing(history, **how):
    return restarts.after_failure(history, **({"step": -1, "joined": True, "now": 0.0} | how))


def test_the_count_starts_anew_only_when_the_run_got_further():
    history = restarts.History()
    for counted, delay in ((1, 1), (2, 2), (3, 4)):
        history = failing(history, step=7)
        assert (history.counted, restarts.delay_s(history)) == (counted, delay)
    history = failing(history, step=6)  # a step before the furthest one is no progress
    assert history.counted == 4
    history = failing(history, step=8)
    assert (history.counted, restarts.delay_s(history)) == (1, 1)


def test_the_delay_is_bounded():
    history = restarts.History()
    for _ in range(2000):
        history = failing(history)
    assert restarts.delay_s(history) == 60


def test_what_ends_before_all_have_met_again_does_not_count_for_ten_minutes():
    history = failing(restarts.History(), joined=False)
    assert history.counted == 1  # nobody has met yet: it may be wrong from the start
    history = failing(history, joined=True, step=3)
    assert history.counted == 1
    for now in (100, 400, 699):
        history = failing(history, joined=False, now=now)
        assert history.counted == 1
    assert failing(history, joined=False, now=701).counted == 2
    met_again = failing(history, joined=True, step=3, now=500)
    assert met_again.counted == 2
    assert failing(met_again, joined=False, now=900).counted == 2


# ---- the supervisor, with stand-ins -------------------------------------------------------------

STAND_IN = """\
import json, os, signal, sys, time
me, attempt = int(os.environ.get("JAX_SFT_PROCESS_ID", 0)), int(os.environ["JAX_SFT_ATTEMPT"])

def status(step=-1, joined=True, phase="training"):
    file = os.environ["JAX_SFT_STATUS"]
    with open(file + ".new", "w") as out:
        json.dump({{"phase": phase, "joined": joined, "step": step, "time": time.time(),
                   "pid": os.getpid()}}, out)
    os.replace(file + ".new", file)

def on(number, action):
    signal.signal(number, lambda *_: action())

def live(seconds=20, **kwargs):
    for _ in range(int(seconds * 10)):
        status(**kwargs)
        time.sleep(0.1)

def say(*words):
    print(*words, flush=True)

assert sys.argv[1:3] == ["-m", "jax_sft.{program}"], sys.argv
exec(sys.argv[-1])
"""
# The supervisor's times, so that a test takes no minutes.
FASTER = """\
import sys
from jax_sft import launch
from jax_sft.runtime import lifecycle
from jax_sft.launching.local import restarts, supervisor
supervisor.SETTLE_S = 0.5
supervisor.FAREWELL_S = 1
supervisor.LOST_KILL_S = 1.5
supervisor.ABORT_S = 0.5
supervisor.NEVER_WROTE_S = 1
lifecycle.SAME_REQUEST_S = 0.5
restarts.delay_s = lambda history: 0.1
lifecycle.begin(requeues=True)
lifecycle.run(launch.main)
"""


class Launched:
    """A launcher of stand-ins that runs, and what came of it."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.began = time.monotonic()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Read stdout until a line was seen so often."""
        seen = 0
        assert self.process.stdout
        while seen < times:
            line = self.process.stdout.readline()
            assert line, f"ended before it said {text!r}"
            seen += text in line

    def end(self, timeout: float = 30) -> int:
        """Wait for its end; returns the exit code."""
        self.out, self.err = self.process.communicate(timeout=timeout)
        self.took = time.monotonic() - self.began
        return self.process.returncode


@pytest.fixture
def start(tmp_path):
    """Start launchers of stand-ins: start(code, *options)."""
    launched = []

    def start(code: str, *options: str, program_name="train", stdin=None, **variables) -> Launched:
        text = STAND_IN.format(program=program_name)
        python = program(tmp_path / "bin" / "stand in", f"#!{sys.executable}\n{text}")
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-c", FASTER, f"--python={python}", *options, code],
            env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        launched.append(process)
        return Launched(process)

    yield start
    for process in launched:
        process.kill()
        process.communicate()


def test_done_is_done_and_lines_carry_their_process(start):
    run = start("say('hello'); print('to stderr', file=sys.stderr)", "--nproc=2")
    assert run.end() == 0
    assert sorted(run.out.splitlines()) == ["[0] hello", "[1] hello"]
    assert "[0] to stderr\n" in run.err and "[1] to stderr\n" in run.err
    assert "environment set here: " in run.err and "first" not in run.err


def test_a_single_process_prints_as_if_it_were_alone(start):
    run = start("say('hello')")
    assert run.end() == 0
    assert (run.out, run.err) == ("hello\n", "")


def test_lines_of_several_hosts_carry_the_host(start):
    host = os.uname().nodename.partition(".")[0]
    run = start("say('hello')", **BY_HAND)
    assert run.end() == 0
    assert run.out == f"[3 {host}] hello\n"


def test_the_last_line_without_its_end_and_endless_lines_come_through(start):
    run = start("sys.stdout.write('x' * 200_000); sys.stdout.flush(); sys.stderr.write('end')")
    assert run.end() == 0
    assert run.out.count("x") == 200_000 and run.err.endswith("end\n")


@pytest.mark.parametrize("code", [64, 65, 74, 75])
def test_what_no_restart_helps_is_handed_on_and_stops_the_others(start, code):
    run = start(f"sys.exit({code}) if me else live()", "--nproc=2")
    assert run.end() == code
    assert run.took < 10 and "starting again" not in run.err
    assert f"process 1 ended first: exit code {code}" in run.err


def test_a_process_that_is_done_does_not_stop_one_that_still_works(start):
    run = start("(live(2), say('exported')) if me == 0 else None", "--nproc=2")
    assert run.end() == 0
    assert "[0] exported" in run.out


@pytest.mark.parametrize("end", ["sys.exit(1)", "os._exit(76)", "os.kill(os.getpid(), 9)"])
def test_a_crash_starts_all_again_at_the_same_port(start, end):
    code = "say(os.environ['JAX_SFT_COORDINATOR'], attempt); status(); "
    code += f"me == 1 and attempt == 0 and (time.sleep(0.5), {end}); attempt == 0 and live()"
    run = start(code, "--nproc=2")
    assert run.end() == 0
    said = {tuple(line.split()[:3:2]) for line in run.out.splitlines()}
    assert said == {("[0]", "0"), ("[1]", "0"), ("[0]", "1"), ("[1]", "1")}
    assert len({line.split()[1] for line in run.out.splitlines()}) == 1
    assert "process 1 ended first" in run.err and "restart 1 of at most 5" in run.err


def test_first_error_first_with_its_last_lines(start):
    code = "print('ValueError: the cause', file=sys.stderr, flush=True) if me else None; "
    code += "me and sys.exit(3); time.sleep(0.2); print('peer lost', file=sys.stderr); sys.exit(76)"
    run = start(code, "--nproc=2", "--max-restarts=0")
    assert run.end() == 3
    block = run.err[run.err.index("process 1 ended first: exit code 3: a crash") :]
    assert "the others: process 0: 76" in block
    assert block.index("  ValueError: the cause") < block.index("giving up")
    assert "peer lost" not in block


def test_a_users_error_wins_over_the_crash_of_those_who_noticed(start):
    run = start("os.abort() if me else (time.sleep(0.3), sys.exit(64))", "--nproc=2")
    assert run.end() == 64
    assert "process 0 ended first" in run.err


def test_restarts_end_where_the_run_gets_no_further(start):
    run = start("say('attempt', attempt); status(7); sys.exit(1)", "--max-restarts=2")
    assert run.end() == 1
    assert run.out.count("attempt") == 3 and "giving up" in run.err


def test_restarts_go_on_while_the_run_gets_further(start):
    run = start("say('go'); status(attempt); attempt < 6 and sys.exit(1)", "--max-restarts=1")
    assert run.end() == 0
    assert run.out.count("go") == 7


def test_an_attempt_that_met_nobody_again_is_not_counted(start):
    code = "status(5, joined=attempt in (0, 4)); say('go'); attempt < 4 and sys.exit(76)"
    run = start(code, "--max-restarts=1")
    assert run.end() == 0
    assert run.out.count("go") == 5 and "not counted" in run.err


def test_a_process_that_hangs_prints_its_stacks_and_is_started_again(start):
    code = "status(3, phase='waiting for storage'); attempt == 0 and time.sleep(30)"
    run = start(code, "--nproc=2", "--stall-timeout=1")
    assert run.end() == 0
    assert run.took < 15 and "last at 'waiting for storage'" in run.err
    assert "Fatal Python error: Aborted" in run.err and 'File "<string>", line 1' in run.err


def test_a_stopped_process_is_ended_too(start):
    code = "status(); attempt == 0 and me == 1 and os.kill(os.getpid(), signal.SIGSTOP)"
    run = start(code, "--nproc=2", "--stall-timeout=1")
    assert run.end() == 0
    assert "process 1 has said nothing" in run.err and "process 1 ended first" in run.err


def test_a_process_that_renews_its_status_is_left_alone(start):
    run = start("live(2); say('done')", "--stall-timeout=1")
    assert run.end() == 0
    assert "done" in run.out and "said nothing" not in run.err


def test_a_status_file_that_never_comes_is_a_hang_of_the_trainer_only(start):
    run = start("attempt == 0 and time.sleep(30)", "--stall-timeout=0.5")
    assert run.end() == 0
    assert "last at 'starting'" in run.err
    doctor = start("time.sleep(1.5)", "--program=doctor", program_name="doctor")
    assert doctor.end() == 0


def test_the_doctor_is_not_started_again(start):
    run = start("say('go'); sys.exit(1)", "--program=doctor", program_name="doctor")
    assert run.end() == 1
    assert run.out.count("go") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_reaches_all_and_their_code_is_handed_on(start, number):
    code = "on(15, lambda: (say('saved'), os._exit(75))); say('ready'); live()"
    run = start(code, "--nproc=2")
    run.wait_for("ready", 2)
    run.process.send_signal(number)
    assert run.end() == 75
    assert run.out.count("saved") == 2 and run.took < 10


def test_trainers_that_were_done_when_told_to_stop_are_done(start):
    run = start("on(15, lambda: os._exit(0)); say('ready'); live()")
    run.wait_for("ready")
    run.process.terminate()
    assert run.end() == 0


def test_who_ignores_the_request_is_killed_after_the_grace(start):
    code = "on(15, lambda: say('ignored')); say('ready'); live()"
    run = start(code, "--nproc=2", "--grace=1")
    run.wait_for("ready", 2)
    run.process.terminate()
    asked = time.monotonic()
    assert run.end() == 75  # the last checkpoint stands: to be queued again
    assert 1 <= time.monotonic() - asked < 5
    assert run.out.count("ignored") == 2


def test_signals_within_moments_are_one_and_a_later_one_is_passed_on(start):
    # A trainer takes a second SIGTERM for the same request, and so it is a SIGINT.
    code = "on(15, lambda: say('asked')); on(2, lambda: (say('now'), os._exit(75))); "
    code += "say('ready'); live()"
    run = start(code)
    run.wait_for("ready")
    for _ in range(3):
        run.process.terminate()
        time.sleep(0.05)
    run.wait_for("asked")
    time.sleep(0.6)
    assert run.process.poll() is None
    run.process.terminate()
    assert run.end() == 75
    assert run.out.splitlines() == ["now"] and "asked again" in run.err


def test_a_request_between_two_attempts_ends_the_waiting(start):
    patient = FASTER.replace("lambda history: 0.1", "lambda history: 30")
    assert patient != FASTER
    run = start("sys.exit(1)")
    run.process.kill()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "FASTER", patient)
        run = start("say('go'); sys.exit(1)")
    run.wait_for("go")
    time.sleep(1)
    run.process.terminate()
    assert run.end(timeout=5) == 75


def alive(pid: int) -> bool:
    """Whether a process is there, and not only waiting to be collected."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:4]
    except FileNotFoundError:
        return False


def wait_for_end_of(pid: int, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def read_pids(run: Launched, count: int) -> list[int]:
    assert run.process.stdout
    return [int(run.process.stdout.readline().split()[-1]) for _ in range(count)]


def test_trainers_end_with_a_supervisor_that_is_killed(start):
    run = start("on(15, lambda: None); say(os.getpid()); live()", "--nproc=2")
    pids = read_pids(run, 2)
    run.process.kill()
    for pid in pids:
        wait_for_end_of(pid)


def test_what_a_trainer_has_started_ends_with_it(start):
    code = "import subprocess; say(subprocess.Popen(['sleep', '60']).pid); sys.exit(64)"
    run = start(code)
    (pid,) = read_pids(run, 1)
    assert run.end() == 64
    wait_for_end_of(pid)


def test_training_goes_on_when_nobody_reads_its_output(start, tmp_path):
    mark = tmp_path / "mark"
    code = "say('ready'); time.sleep(0.5); [say('x' * 1000) for _ in range(300)]; "
    run = start(code + f"open({str(mark)!r}, 'w').close()")
    run.wait_for("ready")
    assert run.process.stdout
    run.process.stdout.close()
    run.process.stdout = None
    assert run.end() == 0
    assert mark.exists() and "stdout cannot be written, and is dropped" in run.err


def test_a_supervisor_on_a_leash_stops_when_told_and_when_left_alone(start):
    code = "on(15, lambda: os._exit(75)); say('ready'); live()"
    for last in ("stop\n", ""):
        run = start(code, "--leash", stdin=subprocess.PIPE, **BY_HAND)
        run.wait_for("ready")
        assert run.process.stdin
        run.process.stdin.write(".\n" + last)
        run.process.stdin.flush()
        if last:
            assert run.process.wait(timeout=10) == 75
        assert run.end() == 75  # closes stdin
    assert "the launcher that started this host has ended" in run.err


def test_all_codes_are_told_in_words():
    assert "killed by signal 9" in exit_codes.describe(-9)
    assert "user" in exit_codes.describe(64) or "error in" in exit_codes.describe(64)
