"""Compiled programs on disk, where the next start finds them, on every host of a run.

JAX does the work: an entry is named by all that decides it (the program, its options, versions,
flags, kind and number of devices, the instructions that a CPU has), the first process writes,
all read. `train` calls `use` before anything is compiled.
"""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxlib.version
from jax.experimental.compilation_cache import compilation_cache

from jax_sft.files import cache_folder, paths
from jax_sft.files.disk import probe_folder
from jax_sft.hosts import cluster, consensus, preflight

OFF = "none"
MOST_BYTES = 10 << 30  # of all entries; a training step takes 0.3 MB on CPUs
SEEN_S = 5.0  # for a file to show up on all hosts
# What JAX says of an entry that was cut off by a kill or a full disk, or is damaged.
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(\w+)'")


def use(wanted: str, workdir: Path, say: Callable[[str], None]) -> None:
    """Let JAX keep what it compiles, unless JAX_COMPILATION_CACHE_DIR says where already.

    A folder that cannot be written, or that not all hosts see, is replaced by one in the workdir:
    hosts of which only some find a program would wait for each other's tuning of its kernels. So
    is a folder that another user may write to: what lies there runs under this user's account.

    Args:
        wanted: `train.compilation_cache`.
        workdir: of the run, which all hosts share.
        say: prints a line.
    """
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        if problem := _untrusted(Path(given)):
            say(f"WARNING compiled programs are not kept in {given}: {problem}")
            _set(None)
        return
    if wanted == OFF:
        _set(None)
        return
    first = (
        paths.local(wanted, "train.compilation_cache")
        if wanted
        else cache_folder.default() / "compiled"
    )
    for root in (first, workdir / "compiled"):
        # JAX's entries name their version; those of XLA's tuning of kernels, beside them, do not.
        folder = root / f"jaxlib-{jaxlib.version.__version__}"
        if not (problem := _obstacle(folder)):
            if cluster.process_id() == 0:
                thin_out(root, MOST_BYTES)
                _mend_damaged()
            _set(folder)
            return
        say(
            f"WARNING compiled programs are not kept in {root} (train.compilation_cache): {problem}"
        )
    _set(None)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Compile anew within, and keep nothing: for programs that are looked at and not run."""
    before = _folder()
    _set(None)
    try:
        yield
    finally:
        _set(Path(before) if before else None)


def _obstacle(folder: Path) -> str:
    """Make the folder; say what is against using it, alike on all processes, "" = nothing."""
    problem = ""
    if cluster.process_id() == 0:
        try:
            for made in (folder.parent, folder):  # the mode of parents is not that of the last one
                made.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe_folder(folder)
            problem = cache_folder.untrusted(folder)
        except OSError as error:
            problem = str(error)
    if problems := consensus.gather("compilation cache", [problem] if problem else []):
        return problems[0]
    return preflight.unseen(folder, "compilation cache", SEEN_S)


def _untrusted(folder: Path) -> str:
    """Say why a folder is not to be read, alike on all processes; "" = it may be."""
    try:
        problem = cache_folder.untrusted(folder) if folder.is_dir() else ""
    except OSError as error:
        problem = str(error)
    return "; ".join(consensus.gather("given compilation cache", [problem] if problem else []))


def _set(folder: Path | None) -> None:
    """Point JAX there; a process that trained before may have used another folder."""
    text = str(folder) if folder else None
    if _folder() == text:
        return
    jax.config.update("jax_compilation_cache_dir", text)
    # All programs of a start, also those that compile within JAX's default of a second.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def _folder() -> str | None:
    """Where JAX keeps what it compiles."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def thin_out(root: Path, most_bytes: int) -> None:
    """Remove the entries used longest ago until the others are small enough.

    JAX's own bound (jax_compilation_cache_max_size) takes a lock for every access, which network
    file systems may not have, and stops working when a process dies while it holds an entry.
    """
    found = []
    for entry in root.rglob("*-cache"):
        try:
            status = entry.stat()
        except OSError:  # another run has removed it
            continue
        # Reading sets atime, at least once a day, unless the file system is mounted otherwise.
        found.append((max(status.st_atime, status.st_mtime), status.st_size, entry))
    total = sum(size for _, size, _ in found)
    for _, size, entry in sorted(found):
        if total <= most_bytes:
            return
        _remove(entry)
        total -= size


@functools.cache
def _mend_damaged() -> None:
    """Remove what JAX warns that it cannot read: it compiles, but stores nothing over a file."""
    show = warnings.showwarning

    def mend(message, *arguments, **options):
        damaged = _UNREADABLE.search(str(message))
        if damaged and (folder := _folder()):
            for entry in Path(folder).glob(f"{damaged[1]}-*-cache"):
                _remove(entry)
        show(message, *arguments, **options)

    warnings.showwarning = mend


def _remove(entry: Path) -> None:
    try:
        entry.unlink(missing_ok=True)
    except OSError as error:  # it stays, and costs space or time
        print(f"{entry} cannot be removed: {error}", flush=True)
