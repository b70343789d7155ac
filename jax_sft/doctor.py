"""Check this machine, or all hosts of a launch, before a run.

    python -m jax_sft.doctor [--workdir=DIR] [--megabytes=64]
    scripts/launch.sh --hosts=h1,h2 --program=doctor --workdir=DIR

Checks versions, devices and driver, file limits, disk space, clocks, whether all hosts see the same
folder and how fast it is, and how fast the devices sum an array together. Names the differences
between hosts. Exits with 1 if anything is wrong.
"""

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_sft.files import paths
from jax_sft.hosts import cluster, preflight
from jax_sft.runtime import exit_codes
from jax_sft.sharding.mesh import use_gpu_memory

LEAST_OPEN_FILES = 4096  # a sharded save or a data set of many files opens thousands
LEAST_FREE_BYTES = 50e9
SLOW_FOLDER_BYTES_PER_S = 50e6


class Findings:
    """Prints the result of each check as a line, on the first process, and collects problems.

    Attributes:
        problems: names of the checks that failed, once per host.
    """

    def __init__(self):
        self.problems: list[str] = []

    def good(self, what: str, result: str) -> None:
        """Print that a check has passed."""
        if cluster.process_id() == 0:
            print(f"ok    {what}: {result}", flush=True)

    def check(self, what: str, problems: list[str], result: str) -> None:
        """Print the result of a check, or the problems of all hosts. All processes call this."""
        texts = cluster.exchange(f"doctor, {what}", "\n".join(problems))
        wrong = {n: text for n, text in enumerate(texts) if text}
        if not wrong:
            self.good(what, result)
        for number, text in wrong.items():
            self.problems.append(what)
            if cluster.process_id() == 0:
                print(f"WRONG {what}, {cluster.name(number)}: {text}", flush=True)


def check_same(findings: Findings) -> None:
    """Check that versions, environment and devices are the same on all hosts."""
    try:
        preflight.same_programs({})
    except ValueError as error:
        findings.check("hosts", [str(error)], "")
        return
    versions = preflight.versions()
    findings.check("hosts", [], f"{cluster.num_processes()} process(es) alike")
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "jax_sft"))
    findings.good("versions", shown)


def check_devices(findings: Findings) -> None:
    """Check that nvidia-smi works and JAX uses GPUs on each host with an NVIDIA driver."""
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind} in all"
    if not shutil.which("nvidia-smi"):
        findings.check("devices", [], f"{kinds}; no NVIDIA driver")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    gpus = done.stdout.strip().splitlines()
    problems = []
    if done.returncode or not gpus:
        problems.append(f"nvidia-smi failed: {done.stdout}{done.stderr}".strip())
    elif jax.default_backend() == "cpu":
        problems.append(f"the driver has {len(gpus)} GPU(s), JAX uses none: requirements-gpu.txt")
    findings.check("devices", problems, f"{kinds}; {gpus[0] if gpus else ''}")


def check_limits(findings: Findings) -> None:
    """Check that enough files can be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    problems = [] if soft >= LEAST_OPEN_FILES else [f"{soft} open files: ulimit -n 65536"]
    findings.check("file limits", problems, f"{soft} open files")


def check_folder(findings: Findings, folder: Path, num_bytes: int) -> None:
    """Check that all hosts see the same folder, and that it has room and is fast."""
    try:
        preflight.shared_folder(folder)
    except ValueError as error:
        findings.check("folder", [str(error)], "")
        return
    findings.check("folder", [], f"{folder} is seen and written by all hosts")
    free = shutil.disk_usage(folder).free
    problems = [] if free > LEAST_FREE_BYTES else [f"only {free / 1e9:.1f} GB free in {folder}"]
    findings.check("disk space", problems, f"{free / 1e9:.0f} GB free")
    write, read = folder_speed(folder, num_bytes)
    shown = f"writes {write / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s"
    is_slow = min(write, read) < SLOW_FOLDER_BYTES_PER_S
    findings.check("folder speed", [f"{shown}: checkpoints will be slow"] * is_slow, shown)


def folder_speed(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Return bytes/s of writing (to the disk) and of reading back (often from memory)."""
    data = np.random.default_rng(cluster.process_id()).bytes(num_bytes)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".speed-") as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if Path(file.name).read_bytes() != data:
            raise OSError(f"{folder} gave back other bytes than were written")
        return num_bytes / (written - began), num_bytes / (time.perf_counter() - written)


def check_collectives(findings: Findings, num_bytes: int) -> None:
    """Check that all devices sum an array together correctly, and measure how fast."""
    if jax.device_count() == 1:
        findings.good("collectives", "one device only")
        return
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    split = NamedSharding(mesh, PartitionSpec("all"))
    whole = NamedSharding(mesh, PartitionSpec())
    columns = max(num_bytes // 4, 1)
    shape = (jax.device_count(), columns)
    values = np.broadcast_to(np.arange(jax.device_count(), dtype=np.float32)[:, None], shape)
    rows = jax.make_array_from_callback(shape, split, lambda index: values[index])
    add_up = jax.jit(lambda x: x.sum(0), out_shardings=whole)
    total = add_up(rows)
    result = float(jnp.asarray(total.addressable_data(0))[-1])
    expected = sum(range(jax.device_count()))
    began = time.perf_counter()
    for _ in range(5):
        total = add_up(rows)
    total.block_until_ready()
    seconds = (time.perf_counter() - began) / 5
    # Bus bandwidth as in NCCL's tests: bytes that each device sends and receives in a ring, per s.
    bus = 2 * (1 - 1 / jax.device_count()) * 4 * columns / seconds
    problems = [] if result == expected else [f"the sum is {result}, not {expected}"]
    shown = f"all-reduce of {4 * columns / 1e6:.0f} MB: {seconds * 1e3:.1f} ms, "
    findings.check("collectives", problems, shown + f"{bus / 1e9:.2f} GB/s per device")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", default="runs", help="a folder that all hosts share [runs]")
    parser.add_argument("--megabytes", type=int, default=64, help="size of each test [64]")
    options = parser.parse_args()
    num_bytes = max(options.megabytes, 1) * 1_000_000
    use_gpu_memory()
    findings = Findings()
    try:
        cluster.initialize()
        cluster.hosts()
        check_same(findings)
        check_devices(findings)
        check_limits(findings)
        preflight.clocks(lambda line: findings.problems.append("clocks") or print(line))
        check_folder(findings, paths.local(options.workdir, "--workdir"), num_bytes)
        check_collectives(findings, num_bytes)
    except (ValueError, OSError, cluster.Lost, cluster.Stopped) as error:
        cluster.say_goodbye(str(error), exit_codes.of(error))
        raise
    if cluster.process_id() == 0:
        verdict = f"{len(findings.problems)} problem(s)" if findings.problems else "all is well"
        print(verdict, flush=True)
    return 1 if findings.problems else 0


if __name__ == "__main__":
    lifecycle.run(main)
