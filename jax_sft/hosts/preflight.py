"""Compare what must be the same on all hosts before anything expensive, and name the odd host.

Texts go over the coordination service, because hosts that differ in their devices or programs would
hang in the first collective.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jax_sft
from jax_sft.hosts import cluster

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# These change the compiled program or the cache lookup; hosts running different programs deadlock.
VARIABLES = (
    *("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS"),
    *("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"),
)
CLOCK_SKEW_S = 5.0
SHARED_S = 30.0  # for a file to show up on all hosts; NFS keeps folder listings for some seconds


def versions() -> dict[str, str]:
    """Return {package: version}, with Python's version and a hash of jax_sft's sources."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return packages | {"python": platform.python_version(), "jax_sft": _sources()}


def _sources() -> str:
    digest = hashlib.sha256()
    package = Path(jax_sft.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def same_programs(config: dict[str, Any]) -> None:
    """Compare versions, config, environment and number of devices.

    Raises:
        ValueError: a host differs. The message names it and what differs.
    """
    if cluster.num_processes() == 1:
        return
    cluster.check_same("versions", versions(), "Install the same versions on every host")
    flat = {key: json.dumps(value) for key, value in _flat(config)}
    cluster.check_same("config", flat, "Start every process with the same command")
    environment = {name: os.environ.get(name, "(not set)") for name in VARIABLES}
    cluster.check_same("environment", environment, "Set the same values on every host")
    devices = {
        "number of devices": str(jax.local_device_count()),
        "kind of devices": jax.local_devices()[0].device_kind,
    }
    cluster.check_same(
        "devices", devices, "Every process needs the same number and kind of devices"
    )


def _flat(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def clocks(say: Callable[[str], Any]) -> None:
    """Warn about hosts whose clock is far from that of process 0; logs would be hard to read."""
    cluster.exchange("clocks, ready", "")  # all processes return from it within half a second
    times = [float(text) for text in cluster.exchange("clocks", repr(time.time()))]
    odd = [n for n, seconds in enumerate(times) if abs(seconds - times[0]) > CLOCK_SKEW_S]
    if odd:
        skews = ", ".join(f"{times[n] - times[0]:+.0f} s" for n in odd)
        say(f"WARNING the clock of {cluster.names(odd)} is off by {skews}")


def shared_folder(folder: Path) -> None:
    """Create a folder and check that all processes see the same one.

    Raises:
        ValueError: process 0 cannot write to it, or other hosts do not see the file it wrote.
    """
    try:
        problem = unseen(folder, "workdir")
    except OSError as error:
        raise ValueError(f"--workdir={folder} cannot be written: {error}") from error
    if problem:
        raise ValueError(f"--workdir={folder}: {problem}. Use a folder on shared storage")


def unseen(folder: Path, what: str, wait_s: float = SHARED_S) -> str:
    """Return a message that names the processes that do not see a folder of process 0; "" = none.

    Process 0 creates the folder.

    Args:
        what: purpose of the folder; keeps the exchanges of different folders apart.
        wait_s: seconds for a file to show up.

    Raises:
        OSError: process 0 cannot write to it.
    """
    nonce = ""
    probe = folder / f".seen-by-all-{uuid.uuid4().hex}"
    if cluster.process_id() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text(probe.name)
        nonce = probe.name
    try:
        nonce = cluster.exchange(f"{what}, nonce", nonce)[0]
        seen = _appears(folder / nonce, wait_s)
        answers = cluster.exchange(f"{what}, seen", str(int(seen)), timeout_s=2 * SHARED_S)
    finally:
        if cluster.process_id() == 0:
            probe.unlink(missing_ok=True)
    if blind := [n for n, answer in enumerate(answers) if answer == "0"]:
        return (
            f"it is not the same folder on all hosts: {cluster.names(blind)} did not see a file "
            "that process 0 wrote there"
        )
    return ""


def _appears(file: Path, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
