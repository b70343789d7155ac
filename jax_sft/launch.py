"""Start a training on this machine or on many, and restart it when a process is lost.

Run by scripts/launch.sh. Unrecognized options are passed through to the trainer.
"""

import argparse
import os
import shlex
import socket
import sys
from pathlib import Path

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin(requeues=True)

from jax_sft.launching import coordinates, environment, processes
from jax_sft.launching.local.output import STDOUT, Printer
from jax_sft.launching.local.supervisor import Options, Supervisor
from jax_sft.launching.remote import fleet, heartbeat, ray_cluster, ssh
from jax_sft.runtime import exit_codes

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "launch.sh"  # exists in a clone, but not in a wheel
EXAMPLES = """\
  scripts/launch.sh --config=configs/tiny.py                  one process drives all local GPUs
  scripts/launch.sh --nproc=8 --config=...                    several processes share them
  scripts/launch.sh --hosts=h1,h2 --config=...                one process on each host, by ssh
  srun scripts/launch.sh --config=...                         in a Slurm job (scripts/slurm.sbatch)
  mpirun scripts/launch.sh --config=...                       under Open MPI; stop it with SIGUSR1
  scripts/launch.sh --ray=ADDRESS --nodes=2 --config=...      on a Ray cluster
  (Kubernetes: scripts/k8s/jobset.yaml)

All other options go to the trainer, on every host. PYTHON names the interpreter (default: that of
.venv, else python3). The exit code is the trainer's: 0 done, 64 invalid input, 65 training
stopped itself, 74 the last state is not saved, 75 asked to stop and saved (queue it again); any
other is a crash or a lost process, after which all is started again and resumes.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors have an exit code after which no launcher restarts."""

    def error(self, message: str):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)


def parser() -> Parser:
    """Define the launcher's options."""
    launch_parser = Parser(
        prog=name if (name := lifecycle.program()).startswith("jax-sft") else "scripts/launch.sh",
        description="Starts a training on one or many hosts, and restarts it when one is lost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = launch_parser.add_argument
    add("--nproc", type=positive, default=1, metavar="N", help="processes per host (default 1)")
    add("--hosts", type=names, metavar="H1,H2", help="start on these hosts by ssh, from here")
    add("--ssh", default="ssh", metavar="COMMAND", help="the ssh command, e.g. 'ssh -p 2222'")
    add("--ray", metavar="ADDRESS", help="start on a Ray cluster: host:port, auto or local")
    add("--nodes", type=positive, metavar="N", help="nodes of the Ray cluster to use")
    add(
        "--gpus-per-node",
        type=not_negative,
        default=8,
        metavar="N",
        help="GPUs per node, with --ray (8)",
    )
    add("--python", default=sys.executable, metavar="PATH", help="interpreter of the trainer")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0 (default: detected)")
    add("--port", type=positive, metavar="N", help="port of the coordinator (default: detected)")
    add(
        "--max-restarts",
        type=not_negative,
        default=5,
        metavar="N",
        help="restarts without progress in between (5)",
    )
    add("--grace", type=seconds, default=120.0, metavar="S", help="time to save when stopped (120)")
    add(
        "--stall-timeout",
        type=seconds,
        default=120.0,
        metavar="S",
        help="time without a sign of life before a process is ended (120)",
    )
    add("--program", choices=("train", "doctor"), default="train", help="the command to run")
    add("--dry-run", action="store_true", help="print the commands of all hosts, and exit")
    add("--leash", action="store_true", help=argparse.SUPPRESS)  # stdin is the heartbeat
    return launch_parser


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def not_negative(text: str) -> int:
    """Parse a whole number from zero up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number, 0 or more")
    return int(text)


def seconds(text: str) -> float:
    """Parse a number of seconds above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas."""
    hosts = tuple(part.strip() for part in text.split(","))
    invalid = [name for name in hosts if not name or name.startswith("-") or " " in name]
    if invalid:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of hosts like h1,h2")
    return hosts


def on_this_host(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the processes of this host and return the exit code."""
    environ = os.environ
    place = coordinates.find(environ, options.nproc, options.coordinator, options.port)
    command = [options.python, "-m", f"jax_sft.{options.program}", *rest]
    plan = processes.plan(place, options.nproc, command, environ)
    several_hosts = place.num_processes > options.nproc * place.local_launchers
    host = socket.gethostname().partition(".")[0] if several_hosts else ""
    printer = Printer(host)
    lines = [f"{place.engine}: {processes.numbers(plan)} of {place.num_processes}"]
    if place.address:
        lines[0] += f", meeting at {place.address}"
    lines += environment.describe(environ, place.address)
    if options.dry_run:
        lines += [processes.as_shell(process.command, process.variables) for process in plan]
        print("\n".join(lines))
        return exit_codes.DONE
    if options.leash:
        printer.write(STDOUT, f"[{host}] launch: started\n".encode())
        heartbeat.hold(printer)
    if place.num_processes > 1:
        printer.say("\n".join(lines))
    is_training = options.program == "train"
    return Supervisor(
        plan,
        Options(
            max_restarts=options.max_restarts if is_training else 0,
            grace_s=options.grace,
            stall_s=options.stall_timeout,
            writes_status=is_training,
        ),
        printer,
        alone=place.num_processes == 1,
        host=host,
    ).run()


def forwarded(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Return the command-line options for the launcher on another host."""
    kept = ("nproc", "max_restarts", "grace", "stall_timeout", "program")
    default = parser().parse_args([])
    changed = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in kept
        if getattr(options, name) != getattr(default, name)
    ]
    return [*changed, *rest]


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code.

    Raises:
        ValueError: an option or the environment is wrong.
    """
    options, rest = parser().parse_known_args(arguments)
    if not rest and options.program == "train":
        parser().print_help(sys.stderr)
        return exit_codes.USER_ERROR
    if options.hosts and options.ray:
        raise ValueError("--hosts and --ray: use one of them")
    if options.hosts:
        return by_ssh(options, rest)
    if options.ray:
        return on_ray(options, rest)
    return on_this_host(options, rest)


def by_ssh(options: argparse.Namespace, rest: list[str]) -> int:
    """Run on hosts that this machine reaches by ssh, and return the exit code."""
    first, port = ssh.name(options.hosts[0]), options.port or coordinates.DEFAULT_PORT
    address = options.coordinator or f"{first}:{port}"
    coordinates.check_address(address)
    hosts = ssh.commands(
        options.hosts,
        forwarded(options, rest),
        nproc=options.nproc,
        address=address,
        ssh=shlex.split(options.ssh),
        launcher=[str(SCRIPT)] if SCRIPT.exists() else [options.python, "-m", "jax_sft.launch"],
        folder=Path.cwd(),
        environ=os.environ,
    )
    if options.dry_run:
        print("\n".join(f"{host.name}: {shlex.join(host.command)}" for host in hosts))
        return exit_codes.DONE
    return ssh.run(hosts, fleet.Options(options.max_restarts, options.grace), Printer())


def on_ray(options: argparse.Namespace, rest: list[str]) -> int:
    """Run on a Ray cluster and return the exit code."""
    if options.nodes is None:
        raise ValueError("--ray needs --nodes=N: how many nodes of the cluster to use")
    job = ray_cluster.Job(
        address=options.ray,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        nproc=options.nproc,
        port=options.port,
        python=options.python,
        arguments=tuple(forwarded(options, rest)),
        root=ROOT,
        folder=Path.cwd(),
        environ=os.environ,
    )
    if options.dry_run:
        print("\n".join(ray_cluster.describe(job)))
        return exit_codes.DONE
    return ray_cluster.run(job, fleet.Options(options.max_restarts, options.grace), Printer())


def main() -> int:
    """Run the command line."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    lifecycle.run(main)
