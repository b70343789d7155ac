"""Cut the link between two hosts during training, and check that both notice and recover.

    python scripts/faults/cut_link.py

The hosts are network namespaces joined by a veth pair. Both have to notice within the bound, start
again, and resume once the link is back. Run it as root; it needs util-linux and iproute2. About 6
minutes on 2 cores.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from twenty_steps import (
    LAUNCH,
    SAVE_STEPS,
    Claims,
    alone,
    environment,
    losses,
    need,
    options,
    wait_for_step,
    wait_until,
    workplace,
)

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NOBODY = "02:00:00:00:00:77"  # a hardware address that no interface has
SLACK_S = 10  # beyond the bound, for the heartbeats and the end of the processes
DOWN_S = 15  # how long the link stays cut after both hosts have noticed


class Host:
    """A network namespace with its own host name and address."""

    def __init__(self, number: int, work: Path):
        self.number, self.name = number, f"host{number + 1}"
        hosts = work / f"hosts{number}"
        names = [f"{address} host{n + 1}\n" for n, address in enumerate(ADDRESSES)]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(names))
        inside = f'hostname {self.name} && mount --bind "{hosts}" /etc/hosts && '
        inside += "ip link set lo up && echo ready && exec sleep infinity"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--propagation=private", "sh", "-c", inside],
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"ready\n"
        self.pid = self._holder.pid

    def enter(self, *command: str) -> list[str]:
        """Return a command line that runs a command on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--", *command]

    def do(self, *command: str) -> None:
        """Run a command on this host."""
        subprocess.run(self.enter(*command), check=True)

    def remove(self) -> None:
        """End the namespace, and with it its end of the link."""
        self._holder.kill()
        self._holder.wait()


@contextlib.contextmanager
def two_hosts(work: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts joined by a link."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in (0, 1):
            hosts.append(Host(number, work))
            stack.callback(hosts[-1].remove)
        ends = ["jaxsft0", "jaxsft1"]
        link = ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]
        subprocess.run(link, check=True)
        for host, end, address in zip(hosts, ends, ADDRESSES, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", str(host.pid)], check=True)
            host.do("ip", "link", "set", end, "name", "link0")
            host.do("ip", "address", "add", f"{address}/24", "dev", "link0")
            host.do("ip", "link", "set", "link0", "up")
        yield hosts[0], hosts[1]


def lose_silently(hosts: tuple[Host, Host], cut: bool) -> None:
    """Send all packets to NOBODY, as a broken switch would, or undo that; interfaces stay up."""
    for host, other in zip(hosts, reversed(ADDRESSES), strict=True):
        if cut:
            entry = ["lladdr", NOBODY, "nud", "permanent", "dev", "link0"]
            host.do("ip", "neighbour", "replace", other, *entry)
        else:
            host.do("ip", "neighbour", "del", other, "dev", "link0")


def pull_the_cable(hosts: tuple[Host, Host], cut: bool) -> None:
    """Take one end of the link down, or bring it up again."""
    hosts[1].do("ip", "link", "set", "link0", "down" if cut else "up")


class Job:
    """A launcher on each host."""

    def __init__(self, work: Path, run: str, hosts: tuple[Host, Host], *more: str):
        self.run, self._logs, self._processes = work / run, [], []
        for host in hosts:
            env = environment(work) | {
                "JAX_SFT_COORDINATOR": f"{ADDRESSES[0]}:29400",
                "JAX_SFT_NUM_PROCESSES": "2",
                "JAX_SFT_PROCESS_ID": str(host.number),
            }
            self._logs.append(work / f"{run}.{host.name}.log")
            with self._logs[-1].open("wb") as log:
                command = host.enter(LAUNCH, *options(work, run), *more)
                self._processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def text(self, host: int) -> str:
        """Return the output of a host so far."""
        return self._logs[host].read_text()

    def wait_for(self, text: str, began: float, timeout_s: float) -> list[float]:
        """Wait until both hosts have printed a text; return the seconds since `began` of each."""
        took = []
        for host in (0, 1):
            wait_until(lambda host=host: text in self.text(host), text, timeout_s)
            took.append(time.monotonic() - began)
        return took

    def end(self) -> list[int]:
        """Wait until both launchers end; return their exit codes."""
        return [process.wait(timeout=600) for process in self._processes]


def main() -> None:
    """Run all checks."""
    need("unshare", "nsenter", "ip", packages="util-linux and iproute2")
    if os.geteuid():
        print("error: run this as root: namespaces need it", file=sys.stderr)
        sys.exit(64)
    claims = Claims()
    with workplace("link") as work, two_hosts(work) as hosts:
        expected = alone(work)
        job = Job(work, "whole", hosts)
        claims.check((codes := job.end()) == [0, 0], f"two hosts end with {codes}")
        two = losses(work / "whole")
        claims.equal(two, expected, "two hosts")
        for run, cut, bound_s in (
            ("silence", lose_silently, 60),  # the default of train.stall_timeout_s
            ("cable", pull_the_cable, 20),
        ):
            job = Job(work, run, hosts, f"--config.train.stall_timeout_s={bound_s}")
            at = wait_for_step(job.run, SAVE_STEPS + 2)
            cut(hosts, True)
            began = time.monotonic()
            noticed = job.wait_for("STOPPED:", began, 3 * bound_s)
            ended = job.wait_for("starting again", began, 60)
            text = f"{run} at step {at}: noticed after {noticed[0]:.1f} and {noticed[1]:.1f} s, "
            text += f"ended after {ended[0]:.1f} and {ended[1]:.1f} s (bound {bound_s} s)"
            claims.check(max(noticed) < bound_s + SLACK_S, text)
            for number in (0, 1):
                message = re.findall(r"STOPPED: (.*)", job.text(number))[0]
                other = hosts[1 - number].name
                claims.check(other in message, f"{hosts[number].name} says: {message}")
            time.sleep(DOWN_S)
            cut(hosts, False)
            claims.check((codes := job.end()) == [0, 0], f"link back: ends with {codes}")
            claims.check("resume  " in job.text(0), "the run was resumed")
            claims.same(losses(job.run), two, run)
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


if __name__ == "__main__":
    main()
