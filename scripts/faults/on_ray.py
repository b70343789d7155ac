"""Check runs on a real Ray cluster of two nodes on this machine.

    RAY_PYTHON=/path/to/python-with-ray python scripts/faults/on_ray.py

Two nodes have to equal one process. All processes have to start again when a trainer, an actor or a
whole node is killed. RAY_PYTHON needs the package ray, the trainer's Python does not. As root it
runs in a network namespace that has only loopback. About 8 minutes on 2 cores.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twenty_steps import (
    LAUNCH,
    SAVE_STEPS,
    Claims,
    alone,
    environment,
    find,
    kill,
    losses,
    need,
    options,
    wait_for_step,
    wait_until,
    workplace,
)

RAY_PYTHON = os.environ.get("RAY_PYTHON", sys.executable)
PORT = 26379


def in_own_network() -> None:
    """Restart this program in a network namespace that has only loopback, if run as root."""
    if os.geteuid() or os.environ.get("ON_RAY_OWN_NETWORK"):
        return
    os.environ["ON_RAY_OWN_NETWORK"] = "1"
    script = 'ip link set lo up && exec "$@"'
    command = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, *sys.argv]
    os.execvp("unshare", command)


class Cluster:
    """Ray nodes on this machine, each with its own address."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._env = environment(folder) | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(RAY_PYTHON).parent}:{os.environ['PATH']}",
        }
        self._nodes: list[subprocess.Popen] = []

    def add(self) -> None:
        """Start one more node; the first is the head."""
        number = len(self._nodes) + 1
        flags = [f"--node-ip-address=127.0.0.{number}", "--num-cpus=2", "--num-gpus=0"]
        if number == 1:
            flags += ["--head", f"--port={PORT}", f"--temp-dir={self._folder}"]
            flags += ["--include-dashboard=false"]
        else:
            flags += [f"--address=127.0.0.1:{PORT}"]
        with (self._folder / f"node{number}.log").open("wb") as log:
            command = [RAY_PYTHON, "-m", "ray.scripts.scripts", "start", "--block", *flags]
            self._nodes.append(subprocess.Popen(command, env=self._env, stdout=log, stderr=log))
        wait_until(lambda: self.size() == number - self._lost(), f"node {number}", 120)

    def _lost(self) -> int:
        return sum(node.poll() is not None for node in self._nodes)

    def size(self) -> int:
        """Return the number of nodes that Ray counts as alive."""
        code = f"import ray; ray.init('127.0.0.1:{PORT}', logging_level='ERROR'); "
        code += "print('nodes', sum(node['Alive'] for node in ray.nodes()))"
        done = subprocess.run(
            [RAY_PYTHON, "-c", code], env=self._env, capture_output=True, text=True
        )
        words = done.stdout.split()
        return int(words[-1]) if words else 0

    def kill(self, index: int) -> None:
        """Kill a node and all its processes, as a power cut would."""
        for pid in reversed(tree(self._nodes[index].pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._nodes[index].wait()

    def stop(self) -> None:
        """End all nodes."""
        for index in reversed(range(len(self._nodes))):
            self.kill(index)


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    pids = [pid]
    for member in pids:
        pids += children.get(member, [])
    return pids


def parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start two nodes and stop them at the end."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        nodes = Cluster(Path(folder))
        try:
            nodes.add()
            nodes.add()
            yield nodes
        finally:
            nodes.stop()


class Job:
    """A running launcher on the cluster."""

    def __init__(self, work: Path, run: str):
        self.run, self._log = work / run, work / f"{run}.log"
        env = environment(work)
        trainer, env["PYTHON"] = env["PYTHON"], RAY_PYTHON
        command = [LAUNCH, f"--ray=127.0.0.1:{PORT}", "--nodes=2", "--gpus-per-node=0"]
        command += [f"--python={trainer}", *options(work, run)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def text(self) -> str:
        """Return the launcher's output so far."""
        return self._log.read_text()

    def end(self) -> int:
        """Wait until the launcher ends; return its exit code."""
        return self.process.wait(timeout=500)


def main() -> None:
    """Run all checks."""
    need("unshare", "ip", packages="util-linux and iproute2")
    if subprocess.run([RAY_PYTHON, "-c", "import ray"], capture_output=True).returncode:
        print(f"error: {RAY_PYTHON} has no ray: set RAY_PYTHON to one that has", file=sys.stderr)
        sys.exit(64)
    in_own_network()
    claims = Claims()
    with workplace("ray") as work, cluster() as nodes:
        expected = alone(work)
        job = Job(work, "two")
        code = job.end()
        claims.check(code == 0, f"two nodes end with {code}")
        two = losses(work / "two")
        claims.equal(two, expected, "two nodes")
        claims.check("[1 " in job.text() and "[0 " in job.text(), "lines carry process and host")

        job = Job(work, "trainer")
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        kill(job.run, 1)
        claims.check((code := job.end()) == 0, f"kill -9 of a trainer: ends with {code}")
        claims.same(losses(job.run), two, f"killed at step {at}")

        job = Job(work, "actor")
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        os.kill(parent(find(job.run, 1, "jax_sft.launch")), 9)
        claims.check((code := job.end()) == 0, f"kill -9 of an actor: ends with {code}")
        claims.check("is lost" in job.text(), "it was noticed as lost")
        claims.same(losses(job.run), two, f"killed at step {at}")

        job = Job(work, "node")
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        nodes.kill(1)
        wait_until(lambda: "waiting for 2 nodes" in job.text(), "the wait for a node", 300)
        nodes.add()
        claims.check((code := job.end()) == 0, f"a node lost, another one added: ends with {code}")
        claims.same(losses(job.run), two, f"lost at step {at}")

        job = Job(work, "stopped")
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        job.process.terminate()
        claims.check((code := job.end()) == 75, f"SIGTERM at step {at}: ends with {code}")
        claims.check((code := Job(work, "stopped").end()) == 0, f"again: ends with {code}")
        claims.same(losses(job.run), two, f"stopped at step {at} and started again")
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


if __name__ == "__main__":
    main()
