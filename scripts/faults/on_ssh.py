"""Check runs over real ssh to two host names of this machine.

    python scripts/faults/on_ssh.py

Two hosts have to equal one process. The loss of a host has to restart both: a killed trainer, a
killed launcher, a cut connection, a frozen host. Needs the Debian packages openssh-server and
openssh-client; it makes its own keys and uses a free port. About 8 minutes on 2 cores.
"""

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from twenty_steps import (
    LAUNCH,
    SAVE_STEPS,
    Claims,
    alone,
    environment,
    find,
    finish,
    kill,
    losses,
    need,
    options,
    wait_for_step,
    wait_until,
    workplace,
)

NOTICED_S = 60  # latest time at which a dead host is noticed
SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey "{work}/host_key"
AuthorizedKeysFile "{work}/user_key.pub"
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """\
Host h1 h2
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile "{work}/user_key"
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


@contextlib.contextmanager
def server(work: Path) -> Iterator[str]:
    """Run an sshd on loopback; yield the ssh command that reaches it as h1 and h2."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key in ("host_key", "user_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / key)]
        subprocess.run(make, check=True)
    (work / "sshd_config").write_text(SERVER.format(port=port, work=work))
    config = work / "ssh_config"
    config.write_text(CLIENT.format(port=port, work=work, user=getpass.getuser()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # required by sshd if run as root
    path = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
    assert path
    with (work / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen([path, "-D", "-e", "-f", work / "sshd_config"], stderr=log)
        try:
            command = ["ssh", "-F", str(config)]

            def answers() -> bool:
                done = subprocess.run([*command, "h1", "true"], stderr=subprocess.DEVNULL)
                return not done.returncode

            wait_until(answers, "sshd")
            yield shlex.join(command)
        finally:
            sshd.terminate()
            sshd.wait()


def parents(pid: int) -> list[int]:
    """Return a process and its ancestors."""
    pids = []
    while pid > 1:
        pids.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pids


def session_of(launcher: int) -> list[int]:
    """Return the sshd processes of a launcher's connection, without the listening sshd."""
    named = [p for p in parents(launcher) if "sshd" in Path(f"/proc/{p}/comm").read_text()]
    return named[:-1]


class Job:
    """A running launcher over h1 and h2."""

    def __init__(self, work: Path, run: str, ssh: str):
        self.run, self._log = work / run, work / f"{run}.log"
        log = self._log.open("wb")
        command = [LAUNCH, "--hosts=h1,h2", f"--ssh={ssh}", f"--coordinator=127.0.0.1:{port()}"]
        self.process = subprocess.Popen(
            [*command, *options(work, run)], env=environment(work), stdout=log, stderr=log
        )

    def text(self) -> str:
        """Return the launcher's output so far."""
        return self._log.read_text()

    def end(self) -> int:
        """Wait until the launcher ends; return its exit code."""
        return self.process.wait(timeout=500)


def port() -> int:
    """Return a free port for the coordinator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run all checks."""
    need("ssh", "ssh-keygen", packages="openssh-client and openssh-server")
    claims = Claims()
    with workplace("ssh") as work, server(work) as ssh:
        expected = alone(work)
        job = Job(work, "two", ssh)
        code = job.end()
        claims.check(code == 0, f"two hosts end with {code}")
        two = losses(work / "two")
        claims.equal(two, expected, "two hosts")
        claims.check("[1 " in job.text() and "[0 " in job.text(), "lines carry process and host")

        job = Job(work, "trainer", ssh)
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        kill(job.run, 1)
        claims.check((code := job.end()) == 0, f"kill -9 of a trainer: ends with {code}")
        claims.same(losses(job.run), two, f"killed at step {at}")

        job = Job(work, "launcher", ssh)
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        kill(job.run, 1, "jax_sft.launch")
        claims.check((code := job.end()) == 0, f"kill -9 of a host's launcher: ends with {code}")
        claims.same(losses(job.run), two, f"killed at step {at}")

        job = Job(work, "frozen", ssh)
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        launcher, trainer = (find(job.run, 1, f"jax_sft.{name}") for name in ("launch", "train"))
        frozen = [*session_of(launcher), launcher, trainer]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: "h2 is lost" in job.text(), "notice of the frozen host", 300)
        took = time.monotonic() - began
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        claims.check(took < NOTICED_S, f"a frozen host: noticed after {took:.0f} s")
        claims.check((code := job.end()) == 0, f"a frozen host: ends with {code}")
        claims.same(losses(job.run), two, f"frozen at step {at}")

        job = Job(work, "stopped", ssh)
        at = wait_for_step(job.run, SAVE_STEPS + 2)
        job.process.terminate()
        claims.check((code := job.end()) == 75, f"SIGTERM at step {at}: ends with {code}")
        claims.check(not left(job.run), "nothing of it runs on any host")
        claims.check((code := Job(work, "stopped", ssh).end()) == 0, f"again: ends with {code}")
        claims.same(losses(job.run), two, f"stopped at step {at} and started again")

        job = Job(work, "gone", ssh)
        wait_for_step(job.run, SAVE_STEPS)
        job.process.kill()
        job.process.wait()
        began = time.monotonic()
        wait_until(lambda: not left(job.run), "end of the hosts of a killed launcher", 200)
        took = time.monotonic() - began
        claims.check(took < 150, f"kill -9 of the launcher here: all hosts stop ({took:.0f} s)")

        wrong = [LAUNCH, "--hosts=h1,nowhere.invalid", f"--ssh={ssh}", *options(work, "wrong")]
        began = time.monotonic()
        code = finish(wrong, environment(work), work / "wrong.log")
        took = time.monotonic() - began
        claims.check(code == 64, f"a host that does not exist: ends with {code} in {took:.0f} s")
        claims.check(not left(work / "wrong"), "nothing of it runs on any host")
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


def left(run: Path) -> list[str]:
    """Return the command lines of trainers of a run that still exist."""
    listing = subprocess.run(["pgrep", "-af", f"workdir={run}"], capture_output=True, text=True)
    return [line for line in listing.stdout.splitlines() if "jax_sft.train" in line]


if __name__ == "__main__":
    main()
