"""Run scripts/launch.sh on each host by ssh, in the same folder, with the host's coordinates."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_sft.launching import environment
from jax_sft.launching.coordinates import MANUAL
from jax_sft.launching.local import output
from jax_sft.launching.local.stop_requests import StopRequests
from jax_sft.launching.remote import fleet

# A host that no longer answers is detected after 3 x 15 s. ssh must never ask for a password.
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)


@dataclass(frozen=True)
class Host:
    """A host, and the local command that starts a launcher on it."""

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
    """Return the ssh command for each host; process 0 is on the first host.

    Args:
        arguments: arguments of the launcher on each host.
        address: host:port of process 0, reachable from all hosts.
        ssh: the ssh command with the user's options.
        launcher: command of the launcher, with the same path on every host.
        folder: working folder, the same path on every host.
    """
    # Pass no other variables: everyone on the host can read a token on a command line.
    carried = environment.given(environ)
    if "PYTHON" in environ:
        carried["PYTHON"] = environ["PYTHON"]
    result = []
    for index, host in enumerate(hosts):
        values = (address, str(len(hosts) * nproc), str(index * nproc))
        variables = carried | dict(zip(MANUAL, values, strict=True))
        launch = [*launcher, "--leash", *arguments]
        assigned = [f"{key}={value}" for key, value in variables.items()]
        line = f"cd {shlex.quote(str(folder))} && exec env {shlex.join([*assigned, *launch])}"
        # ssh joins its arguments with blanks and passes the line to the shell of the host.
        result.append(Host(host, (*ssh, *OPTIONS, "--", host, line)))
    return tuple(result)


def name(host: str) -> str:
    """Return a host's name without the login user."""
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
            start_new_session=True,  # Ctrl-C goes to this process only, which stops the hosts
        )
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout and stderr
        self._stdout = output.Pump(stdout, output.STDOUT, "", printer)
        self._stderr = output.Pump(stderr, output.STDERR, "", printer)

    @property
    def reached(self) -> bool:
        """Whether the remote launcher has printed to stdout, where ssh itself prints nothing."""
        return self._stdout.num_lines > 0

    def poll(self) -> int | None:
        """Return the exit code of the launcher or None; ssh's own 255 equals fleet.GONE."""
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
            return  # the launcher has just ended; `poll` reports it

    def end(self) -> None:
        """Close the connection; a launcher that still runs notices and stops."""
        self._process.kill()
        self._process.wait()


def run(hosts: Sequence[Host], options: fleet.Options, printer: output.Printer) -> int:
    """Start, watch and restart the launchers on all hosts; return the exit code."""

    def start(_: StopRequests) -> list[Connection]:
        return [Connection(host, printer) for host in hosts]

    return fleet.run(start, options, printer)
