"""Cache compiled programs on disk for the next start, on every host of a run.

JAX does the work. It names an entry by everything that decides it: the program, its options,
versions, flags, kind and number of devices, and the instruction set of a CPU. The first process
writes, all processes read. `train` calls `use` before anything is compiled.
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
# JAX's warning about an entry that was cut off by a kill or a full disk, or is damaged.
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(\w+)'")


def use(wanted: str, workdir: Path, say: Callable[[str], None]) -> None:
    """Enable JAX's compilation cache, unless JAX_COMPILATION_CACHE_DIR already names its folder.

    A folder that cannot be written, or that not all hosts see, is replaced by one in the workdir.
    If only some hosts found a program, they would wait for the others to tune its kernels. A folder
    that another user may write to is replaced as well, because the programs in it run under this
    user's account.

    Args:
        wanted: `train.compilation_cache`.
        workdir: folder of the run, which all hosts share.
        say: prints a line.
    """
    # 1. The environment variable takes precedence over the config.
    if configured := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        if problem := _untrusted(Path(configured)):
            say(f"WARNING compiled programs are not kept in {configured}: {problem}")
            _set(None)
        return
    if wanted == OFF:
        _set(None)
        return
    # 2. The configured folder or the user's default comes before the one in the workdir.
    first = (
        paths.local(wanted, "train.compilation_cache")
        if wanted
        else cache_folder.default() / "compiled"
    )
    for root in (first, workdir / "compiled"):
        # JAX's entries name their version, but XLA's kernel tuning entries next to them do not.
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
    """Disable the cache inside the block: for programs that are inspected and not run."""
    before = _folder()
    _set(None)
    try:
        yield
    finally:
        _set(Path(before) if before else None)


def _obstacle(folder: Path) -> str:
    """Create the folder and return why it cannot be used (the same on all processes), or ""."""
    problem = ""
    if cluster.process_id() == 0:
        try:
            # mkdir applies `mode` only to the last folder of a path, so create both.
            for level in (folder.parent, folder):
                level.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe_folder(folder)
            problem = cache_folder.untrusted(folder)
        except OSError as error:
            problem = str(error)
    if problems := consensus.gather("compilation cache", [problem] if problem else []):
        return problems[0]
    return preflight.unseen(folder, "compilation cache", SEEN_S)


def _untrusted(folder: Path) -> str:
    """Return why a folder must not be read (the same on all processes), or ""."""
    try:
        problem = cache_folder.untrusted(folder) if folder.is_dir() else ""
    except OSError as error:
        problem = str(error)
    return "; ".join(consensus.gather("given compilation cache", [problem] if problem else []))


def _set(folder: Path | None) -> None:
    """Set JAX's cache folder; an earlier run in this process may have used another one."""
    text = str(folder) if folder else None
    if _folder() == text:
        return
    jax.config.update("jax_compilation_cache_dir", text)
    # Store all programs of a start, even those that compile faster than JAX's minimum of 1 s.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def _folder() -> str | None:
    """Return the folder of JAX's compilation cache, or None."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def thin_out(root: Path, most_bytes: int) -> None:
    """Remove the least recently used entries until the rest take at most `most_bytes`.

    JAX's own limit (jax_compilation_cache_max_size) takes a lock for every access, which network
    file systems may not support, and stops working when a process dies while it holds an entry.
    """
    entries = []
    for entry in root.rglob("*-cache"):
        try:
            status = entry.stat()
        except OSError:  # another run has removed it
            continue
        # Reading updates atime at least once a day, unless the mount options disable that.
        entries.append((max(status.st_atime, status.st_mtime), status.st_size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= most_bytes:
            return
        _remove(entry)
        total -= size


@functools.cache
def _mend_damaged() -> None:
    """Remove entries that JAX cannot read: it recompiles, but never overwrites an existing file."""
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
    except OSError as error:  # the entry stays and costs space or time
        print(f"{entry} cannot be removed: {error}", flush=True)
