"""Run on a Ray cluster: one actor per node runs scripts/launch.sh there with its coordinates.

Ray only places and watches the launchers. The trainers join each other without Ray, in a Python
that need not have it. Only this module imports Ray.
"""

import importlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_sft.launching import coordinates, environment
from jax_sft.launching.coordinates import MANUAL
from jax_sft.launching.local import output
from jax_sft.launching.local.stop_requests import StopRequests
from jax_sft.launching.processes import as_shell
from jax_sft.launching.remote import fleet

POLL_S = 60  # for an actor to answer
_TELL_S = 30  # between messages that nodes are missing
_NODES_PYTHON = "PYTHON-OF-THE-NODE"  # placeholder for the Python of Ray on each node


class Node:
    """An actor that runs the launcher of its node and keeps its output."""

    def __init__(self):
        self._lines: list[tuple[int, bytes]] = []
        self._process: subprocess.Popen | None = None
        self._pumps: list[output.Pump] = []

    def write(self, stream: int, line: bytes) -> None:
        """Keep a line until the next poll; see `output.Writer`."""
        self._lines.append((stream, line))

    def where(self, port: int | None) -> tuple[str, int]:
        """Return this node's address in the Ray cluster and a port for the coordinator."""
        ray = load()
        return ray.util.get_node_ip_address(), port or coordinates.free_port()

    def start(self, command: Sequence[str], folder: str, variables: Mapping[str, str]) -> None:
        """Start the launcher, which ends when this actor ends."""
        command = [sys.executable if part == _NODES_PYTHON else part for part in command]
        self._process = subprocess.Popen(
            ["env", *(f"{name}={value}" for name, value in variables.items()), *command],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout and stderr
        self._pumps = [
            output.Pump(stdout, output.STDOUT, "", self),
            output.Pump(stderr, output.STDERR, "", self),
        ]

    def poll(self, sent: bytes) -> tuple[list[tuple[int, bytes]], int | None]:
        """Send bytes to the launcher; return its new lines and its exit code (None = running)."""
        assert self._process and self._process.stdin
        code = self._process.poll()
        if code is None and sent:
            try:
                self._process.stdin.write(sent)
                self._process.stdin.flush()
            except BrokenPipeError:
                code = self._process.wait()
        if code is not None:
            for pump in self._pumps:
                pump.join(timeout=2)
        lines, self._lines = self._lines, []
        return lines, code


class Remote:
    """The driver's handle of an actor; see `fleet.Remote`."""

    reached = True  # Ray has placed it

    def __init__(self, name: str, actor: Any, printer: output.Printer):
        self.name = name
        self._actor, self._printer = actor, printer
        self._to_send = b""

    def poll(self) -> int | None:
        """Print the new lines of the node; return the exit code of its launcher, GONE, or None."""
        ray = load()
        sent, self._to_send = self._to_send, b""
        try:
            lines, code = ray.get(self._actor.poll.remote(sent), timeout=POLL_S)
        except ray.exceptions.RayError as error:
            self._printer.say(f"{self.name} is lost: {str(error).splitlines()[0]}")
            return fleet.GONE
        for stream, line in lines:
            self._printer.write(stream, line)
        return code

    def send(self, line: bytes) -> None:
        """Queue a line that the next poll sends to the launcher."""
        self._to_send += line

    def end(self) -> None:
        """End the actor and, with it, the launcher that it started."""
        load().kill(self._actor)


def load() -> Any:
    """Import Ray.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util")
    except ImportError as error:
        raise ValueError(
            f"--ray needs the package ray, which {sys.executable} does not have: install it there "
            "(pip install ray), or set PYTHON to a Python that has it and --python to the trainer's"
        ) from error
    return ray


@dataclass(frozen=True)
class Job:
    """A run to start on a Ray cluster."""

    address: str  # of the cluster
    nodes: int
    gpus_per_node: int
    nproc: int  # processes per node
    port: int | None  # of the coordinator; None = any free port
    python: str  # Python of the trainer
    arguments: tuple[str, ...]  # of scripts/launch.sh on each node
    root: Path  # folder of this project, the same path on every node
    folder: Path  # working folder, the same path on every node
    environ: Mapping[str, str]


def command(job: Job) -> list[str]:
    """Return the command of a node's launcher."""
    launch = [_NODES_PYTHON, "-m", "jax_sft.launch", "--leash", f"--python={job.python}"]
    return [*launch, *job.arguments]


def variables(job: Job, meeting: str, node: int) -> dict[str, str]:
    """Return the variables of a node's launcher, in addition to those that Ray sets."""
    paths = [str(job.root), *filter(None, [job.environ.get("PYTHONPATH", "")])]
    carried = environment.given(job.environ)
    # Leave out CUDA_* of this machine; Ray sets CUDA_VISIBLE_DEVICES on each node.
    own = {name: value for name, value in carried.items() if not name.startswith("CUDA_")}
    values = (meeting, str(job.nodes * job.nproc), str(node * job.nproc))
    return own | {"PYTHONPATH": ":".join(paths)} | dict(zip(MANUAL, values, strict=True))


def describe(job: Job) -> list[str]:
    """Return one line per node with the command that its actor would run."""
    meeting = "ADDRESS-OF-NODE-0:PORT"
    return [
        f"node {n}: {as_shell(command(job), variables(job, meeting, n))}" for n in range(job.nodes)
    ]


def run(job: Job, options: fleet.Options, printer: output.Printer) -> int:
    """Start, watch and restart the launchers on the cluster's nodes; return the exit code.

    Raises:
        ValueError: Ray is not installed, or its cluster cannot be reached.
    """
    ray = load()
    try:
        ray.init(address=job.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"--ray={job.address}: no Ray cluster answers: {error}") from error
    groups: list[Any] = []

    def start(requests: StopRequests) -> list[Remote]:
        remove_groups(groups)
        group = _place(job.nodes, job.gpus_per_node, requests, printer)
        if group is None:
            return []
        groups.append(group)
        actors = _actors(group, job.nodes, job.gpus_per_node, job.root)
        try:
            host, port = ray.get(actors[0].where.remote(job.port))
            for n, actor in enumerate(actors):
                added = variables(job, f"{host}:{port}", n)
                ray.get(actor.start.remote(command(job), str(job.folder), added))
        except ray.exceptions.RayError as error:  # the first poll returns GONE for the node
            printer.say(f"a node was lost while it was started: {str(error).splitlines()[0]}")
        return [Remote(f"node {n}", actor, printer) for n, actor in enumerate(actors)]

    try:
        return fleet.run(start, options, printer)
    finally:
        remove_groups(groups)
        ray.shutdown()


def remove_groups(groups: list[Any]) -> None:
    """Remove placement groups, which releases their nodes."""
    while groups:
        load().util.remove_placement_group(groups.pop())


def _place(nodes: int, gpus_per_node: int, requests: StopRequests, printer: output.Printer) -> Any:
    """Reserve resources on `nodes` nodes; return None if asked to stop while waiting."""
    ray = load()
    bundle = {"CPU": 1, **({"GPU": gpus_per_node} if gpus_per_node else {})}
    group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    waited = 0
    while not group.wait(timeout_seconds=1):
        if requests.count:
            ray.util.remove_placement_group(group)
            return None
        if waited % _TELL_S == 0:
            printer.say(f"waiting for {nodes} nodes with {bundle} free on each")
        waited += 1
    return group


def _actors(group: Any, nodes: int, gpus_per_node: int, root: Path) -> list[Any]:
    """Start an actor on each node of a placement group."""
    ray = load()
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    return [
        ray.remote(Node)
        .options(
            num_cpus=1,
            num_gpus=gpus_per_node,
            max_restarts=0,  # all actors restart together or not at all
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=n
            ),
            runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
        )
        .remote()
        for n in range(nodes)
    ]
