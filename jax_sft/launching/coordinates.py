"""Find how many processes a run has, which of them this launcher starts, and where they join.

`find` reads the variables that the engine that started this launcher has set.
"""

import random
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

DEFAULT_PORT = 29400
# Ports that the kernel does not use for outgoing connections (those start at 32768).
FIRST_PORT, NUM_PORTS = 10_000, 20_000
MANUAL = ("JAX_SFT_COORDINATOR", "JAX_SFT_NUM_PROCESSES", "JAX_SFT_PROCESS_ID")
LOOPBACK = "127.0.0.1"
# Slurm's step ids for processes outside a step of srun: 2**32 - 5 is a batch script, 2**32 - 6 the
# shell of salloc.
_FIRST_UNREAL_STEP = 2**32 - 6


@dataclass(frozen=True)
class Coordinates:
    """Position of this launcher's processes among all processes of the run."""

    engine: str  # engine that started the launcher, for messages
    num_processes: int  # of the run
    first_process: int  # number of the first process of this launcher
    address: str | None  # host:port where process 0 listens; None for a single process
    local_launchers: int = 1  # launchers on this machine, which share its GPUs
    local_launcher: int = 0  # number of this launcher among them


def find(
    environ: Mapping[str, str], nproc: int, coordinator: str | None = None, port: int | None = None
) -> Coordinates:
    """Return the coordinates of the `nproc` processes of this launcher.

    Args:
        nproc: number of processes that this launcher starts.
        coordinator: host:port that overrides the detected address.
        port: port of the coordinator that replaces the engine's or the default port.

    Raises:
        ValueError: the environment is incomplete or invalid; the message has the remedy.
    """
    # Order of precedence: 1. variables set manually; 2. Open MPI; 3. Slurm; 4. this machine.
    # Open MPI precedes Slurm because it starts its daemons with srun, whose variables its processes
    # inherit.
    if any(environ.get(name) for name in MANUAL):
        coordinates = _manual(environ, nproc)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        coordinates = _open_mpi(environ, nproc, port, needs_address=coordinator is None)
    elif _is_slurm_step(environ):
        coordinates = _slurm(environ, nproc, port)
    else:
        _refuse_forgotten_srun(environ)
        coordinates = _local(nproc, port, needs_address=coordinator is None)
    if coordinator and coordinates.num_processes > 1:
        coordinates = replace(coordinates, address=coordinator)
    if coordinates.address:
        check_address(coordinates.address)
    return coordinates


def check_address(address: str) -> None:
    """Check that an address is host:port.

    Raises:
        ValueError: `address` is not host:port.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator {address!r} is not HOST:PORT")


def _manual(environ: Mapping[str, str], nproc: int) -> Coordinates:
    missing = [name for name in MANUAL if not environ.get(name)]
    if missing:
        present = [name for name in MANUAL if name not in missing]
        raise ValueError(f"{present} set, but not {missing}: set all three, or none")
    count, first = (_number(environ, name) for name in MANUAL[1:])
    if first + nproc > count:
        raise ValueError(
            f"JAX_SFT_PROCESS_ID = {first} and --nproc={nproc} go beyond "
            f"JAX_SFT_NUM_PROCESSES = {count}: process numbers start at 0, and the id is that of "
            "the first process on a host"
        )
    return Coordinates("JAX_SFT_* set manually", count, first, environ[MANUAL[0]])


def _open_mpi(
    environ: Mapping[str, str], nproc: int, port: int | None, needs_address: bool
) -> Coordinates:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    size, rank, local_size, local_rank = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in names
    )
    # The namespace is the same in all processes of an mpirun and differs in the next mpirun.
    job = environ.get("PMIX_NAMESPACE", "")
    job_port = FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS if job else DEFAULT_PORT
    coordinates = Coordinates(
        "Open MPI", size * nproc, rank * nproc, None, local_size, local_launcher=local_rank
    )
    if coordinates.num_processes == 1 or not needs_address:
        return coordinates
    host = LOOPBACK if size == local_size else _open_mpi_first_host(environ)
    return replace(coordinates, address=f"{host}:{port or job_port}")


def _open_mpi_first_host(environ: Mapping[str, str]) -> str:
    """Return the host of rank 0, which listens.

    Open MPI 4 provides the addresses of mpirun's own host, where rank 0 runs unless the host file
    says otherwise. Open MPI 5 provides nothing, but within a Slurm job it fills the nodes in order.
    """
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # 123.0;tcp://10.0.0.1,172.17.0.1:34911;tcp6://
    if address := re.search(r"tcp://([^,:;]+)", uri):
        return address[1]
    if nodes := environ.get("SLURM_JOB_NODELIST"):
        return first_host(nodes)
    raise ValueError(
        "Open MPI does not say on which host rank 0 is: add --coordinator=HOST:PORT with the name "
        f"of that host and a free port, e.g. {DEFAULT_PORT}"
    )


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and step.isdecimal() and not int(step) >= _FIRST_UNREAL_STEP


def _slurm(environ: Mapping[str, str], nproc: int, port: int | None) -> Coordinates:
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    task, local, node = (
        _number(environ, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID")
    )
    per_node = _counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    host = LOOPBACK if len(per_node) == 1 else first_host(nodes)
    job_port = FIRST_PORT + _number(environ, "SLURM_JOB_ID") % NUM_PORTS
    count = tasks * nproc
    return Coordinates(
        engine="Slurm",
        num_processes=count,
        first_process=task * nproc,
        address=f"{host}:{port or job_port}" if count > 1 else None,
        local_launchers=per_node[node],
        local_launcher=local,
    )


def _refuse_forgotten_srun(environ: Mapping[str, str]) -> None:
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" in environ and nodes.isdecimal() and int(nodes) > 1:
        raise ValueError(
            f"this Slurm job has {nodes} nodes, but this is not a step of srun: only one node "
            "would train. Start it with `srun scripts/launch.sh ...`, one task per node, as "
            "scripts/slurm.sbatch does"
        )


def _local(nproc: int, port: int | None, needs_address: bool) -> Coordinates:
    coordinates = Coordinates("this machine", nproc, 0, None)
    if nproc == 1 or not needs_address:
        return coordinates
    if port and not is_free(port):
        raise ValueError(f"port {port} is in use: choose another --port, or leave it out")
    return replace(coordinates, address=f"{LOOPBACK}:{port or free_port()}")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name} = {text!r} is not a number, or not set")
    return int(text)


def _counts(text: str) -> list[int]:
    """Parse Slurm's tasks per node: "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not matched:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE = {text!r} is not understood")
        counts += [int(matched[1])] * int(matched[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: "a[007-9,12]b,c" is "a007b".

    Raises:
        ValueError: `nodes` is not a node list.
    """
    matched = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", matched[0]) if matched else ""
    if not re.fullmatch(r"[\w.-]+", first):
        raise ValueError(f"the node list {nodes!r} is not understood: use --coordinator=HOST:PORT")
    return first


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Return whether a port of this machine can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a free port, outside the range from which the kernel takes ports.

    Such a port is more likely to stay free than a port chosen by the kernel.

    Raises:
        ValueError: none of a hundred random ports is free.
    """
    for port in random.sample(range(FIRST_PORT, FIRST_PORT + NUM_PORTS), 100):
        if is_free(port, ""):
            return port
    raise ValueError("none of 100 random ports of this machine is free: choose a port with --port")
