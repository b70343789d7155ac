"""One ssh per host that runs scripts/launch.sh there, in the same folder, with its coordinates."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_sft.launching import environment
from jax_sft.launching.coordinates import BY_HAND
from jax_sft.launching.local import output
from jax_sft.launching.local.stop_requests import StopRequests
from jax_sft.launching.remote import fleet

# A host that no longer answers is noticed after 3 x 15 s; nothing here may ask for a password.
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)


@dataclass(frozen=True)
class Host:
    """A host, and the command here that starts a launcher there."""

    name: str
    command: tuple[str, ...]


def commands(
    hosts: Sequence[str],
    arguments: Sequence[str],
    *,
    nproc: int,
    address: str,
    ssh: Sequence[str],
    launcher: Sequence[str],
    folder: Path,
    environ: Mapping[str, str],
) -> tuple[Host, ...]:
    """Return what is run for each host; process 0 is on the first.

    Args:
        arguments: of the launcher on each host.
        address: host:port of process 0, as all hosts know it.
        ssh: the command with the user's options.
        launcher: its command, and `folder` the one to work in: the same paths on every host.
    """
    # No other variables: a token on a command line can be read by everybody on the host.
    carried = environment.given(environ)
    if "PYTHON" in environ:
        carried["PYTHON"] = environ["PYTHON"]
    found = []
    for index, host in enumerate(hosts):
        values = (address, str(len(hosts) * nproc), str(index * nproc))
        variables = carried | dict(zip(BY_HAND, values, strict=True))
        launch = [*launcher, "--leash", *arguments]
        assigned = [f"{key}={value}" for key, value in variables.items()]
        there = f"cd {shlex.quote(str(folder))} && exec env {shlex.join([*assigned, *launch])}"
        # ssh joins its arguments with blanks and gives the line to the shell there.
        found.append(Host(host, (*ssh, *OPTIONS, "--", host, there)))
    return tuple(found)


def name(host: str) -> str:
    """Return a host's name without the user to log in as."""
    return host.rpartition("@")[2]


class Connection:
    """A running ssh; see `fleet.Remote`."""

    def __init__(self, host: Host, printer: output.Printer):
        self.name = host.name
        self._process = subprocess.Popen(
            host.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: we tell the hosts
        )
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout and stderr
        self._stdout = output.Pump(stdout, output.STDOUT, "", printer)
        self._stderr = output.Pump(stderr, output.STDERR, "", printer)

    @property
    def reached(self) -> bool:
        """Whether the launcher there has started: its first line is on stdout, as ssh's never."""
        return self._stdout.num_lines > 0

    def poll(self) -> int | None:
        """Return the launcher's exit code; ssh's own 255 is fleet.GONE."""
        code = self._process.poll()
        if code is None:
            return None
        for pump in (self._stdout, self._stderr):
            pump.join(timeout=2)
        return fleet.GONE if code < 0 else code

    def send(self, line: bytes) -> None:
        """Send the launcher a line."""
        assert self._process.stdin
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it has just ended: poll tells

    def end(self) -> None:
        """Close the connection: a launcher that is still there notices, and stops."""
        self._process.kill()
        self._process.wait()


def run(hosts: Sequence[Host], options: fleet.Options, printer: output.Printer) -> int:
    """Start on all hosts, watch, and start again; return the exit code."""

    def start(_: StopRequests) -> list[Connection]:
        return [Connection(host, printer) for host in hosts]

    return fleet.run(start, options, printer)
