"""Run a Slurm cluster of two nodes on this machine, for the scripts of this folder.

Nothing is installed or left behind. The files are in a temporary folder, and the names of the nodes
are in an /etc/hosts that only this process and its children see (a mount namespace).
"""

import contextlib
import os
import pwd
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = "slurm-wlm and munge (Debian's names)"
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def in_own_mounts() -> None:
    """Restart this program in a mount namespace, for its own /etc/hosts; end it if not root."""
    if os.environ.get("ON_SLURM_OWN_MOUNTS"):
        return
    if os.geteuid() != 0:
        print("error: run this as root: slurmd and the mount namespace need it", file=sys.stderr)
        sys.exit(64)
    os.environ["ON_SLURM_OWN_MOUNTS"] = "1"
    command = [sys.executable, *sys.argv]
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *command])


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Start a cluster and stop it at the end; yield the folder of its files."""
    with tempfile.TemporaryDirectory(prefix="slurm-here-") as name:
        folder = Path(name)
        started: list[subprocess.Popen] = []
        try:
            _start(folder, started)
            yield folder
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()


def _start(folder: Path, started: list[subprocess.Popen]) -> None:
    host, user = socket.gethostname(), pwd.getpwuid(os.geteuid()).pw_name
    hosts = folder / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 n1 n2 {host}\n")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    ports = _free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=user, folder=folder, ports=ports))
    os.environ["SLURM_CONF"] = str(conf)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)

    def run(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}.{len(started)}.out").open("wb")
        started.append(subprocess.Popen(command, stdout=log, stderr=log))

    run(
        *("munged", "--foreground", "--force", f"--key-file={key}"),
        *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
        *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
    )
    _wait(lambda: (folder / "munge.socket").exists(), "munged", folder)
    run("slurmctld", "-D", "-f", str(conf))
    for node in ("n1", "n2"):
        run("slurmd", "-D", "-N", node, "-f", str(conf))
    _wait(lambda: _idle() == 2, "two idle nodes", folder)


def _idle() -> int:
    listing = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True)
    return listing.stdout.split().count("idle")


def _wait(condition, what: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            for log in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out")):
                print(f"--- {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            raise TimeoutError(f"no {what} within 60 s")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for_idle() -> None:
    """Wait until both nodes are idle, for at most 90 s."""
    deadline = time.monotonic() + 90
    while _idle() != 2 and time.monotonic() < deadline:
        time.sleep(0.5)
