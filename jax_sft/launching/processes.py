"""Plan the processes of a host: the command and the environment of each."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax_sft.launching import environment, gpus
from jax_sft.launching.coordinates import MANUAL, Coordinates


@dataclass(frozen=True)
class Process:
    """The number, command and environment of a process to start."""

    number: int  # among all processes of the run
    command: tuple[str, ...]
    variables: Mapping[str, str]  # added to the launcher's own environment


def plan(
    where: Coordinates,
    nproc: int,
    command: Sequence[str],
    environ: Mapping[str, str],
) -> tuple[Process, ...]:
    """Return the processes that this launcher starts.

    Args:
        where: coordinates of this launcher.
        nproc: number of processes that this launcher starts.
        command: command of every process, e.g. python -m jax_sft.train --config=...
        environ: environment of this launcher.

    Raises:
        ValueError: the GPUs cannot be divided evenly.
    """
    shared = environment.settings(environ, where.address)
    if where.address:
        shared |= {MANUAL[0]: where.address, MANUAL[1]: str(where.num_processes)}
    parts = shares(where, nproc, environ)
    processes = []
    for index in range(nproc):
        variables = dict(shared)
        if where.address:
            variables[MANUAL[2]] = str(where.first_process + index)
        if parts[index]:
            variables[gpus.VARIABLE] = ",".join(map(str, parts[index]))
        processes.append(Process(where.first_process + index, tuple(command), variables))
    return tuple(processes)


def shares(where: Coordinates, nproc: int, environ: Mapping[str, str]) -> list[tuple[int, ...]]:
    """Return the GPUs of each process of this launcher; () = all GPUs that it sees."""
    num_launchers, launcher = where.local_launchers, where.local_launcher
    if gpus.bound_by_slurm(environ):  # this launcher sees only its own GPUs
        num_launchers, launcher = 1, 0
    if num_launchers * nproc == 1:
        return [()]
    visible = gpus.visible(environ)
    if not visible:
        return [()] * nproc
    return gpus.divide(visible, num_launchers * nproc)[launcher * nproc : (launcher + 1) * nproc]


def as_shell(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return a command and its environment as a line to paste into a shell."""
    assigned = [f"{name}={value}" for name, value in variables.items()]
    return shlex.join(["env", *assigned, *command] if assigned else command)


def numbers(processes: Sequence[Process]) -> str:
    """Return the name of a range of processes in messages."""
    first, last = processes[0].number, processes[-1].number
    return f"process {first}" if first == last else f"processes {first} to {last}"
