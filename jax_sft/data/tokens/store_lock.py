"""Locks of the stores in the cache of tokens, and removal of what killed builds left there.

Called by `cache` around a build. One process builds a store; the others wait and name it.
"""

import contextlib
import errno
import fcntl
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jax_sft.data.tokens.store import Damaged

HUNG_S = 900  # a build that has written nothing for this long hangs
SAY_AGAIN_S = 60
LEFTOVER_S = 24 * 3600  # a build that has written nothing for this long is dead


@contextlib.contextmanager
def explained(cache: Path, damage: Damaged | None = None) -> Iterator[None]:
    """Add a remedy to errors of the operating system about the cache folder.

    Args:
        damage: of the store that has to be built again.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room, or set data.cache_dir to a folder on a larger disk"
        else:
            remedy = "set data.cache_dir to a folder that can be written"
        why = f" (the store in it is damaged: {damage})" if damage else ""
        raise ValueError(
            f"the cache folder {cache} cannot be used: {error}{why}: {remedy}"
        ) from error


@contextlib.contextmanager
def lock(cache: Path, key: str, source: str, damage: Damaged | None) -> Iterator[bool]:
    """Let one process at a time build a store; the lock ends with the process that holds it.

    Args:
        source: name of the source in messages.
        damage: of the store that has to be built again.

    Yields whether there is a lock, since not every file system has them. Without one, the rename at
    the end of a build still keeps the store intact.
    """
    with explained(cache, damage):
        cache.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: opening a FIFO in place of the file would block forever.
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        stream = open(os.open(cache / f"{key}.lock", flags, 0o666), "r+b", buffering=0)
    with stream:
        locked = _try_lock(stream)
        if locked is False:
            _wait(cache, key, source, stream)
        if locked is not None:
            _sign(stream)
        yield locked is not None


def _sign(stream) -> None:
    """Write the holder of a lock into its file, for the processes that wait."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk
        stream.seek(0)  # `_wait` has moved the position by reading
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())


def _wait(cache: Path, key: str, source: str, stream) -> None:
    """Wait for another process to build a store, and name it every SAY_AGAIN_S.

    Raises:
        ValueError: it has written nothing for HUNG_S.
    """
    said, size, grown = -math.inf, -1, time.monotonic()
    while _try_lock(stream) is False:
        now, before = time.monotonic(), size
        size = sum(_size(file) for file in cache.glob(f"{key}.unfinished-*/*"))
        if size != before:
            grown = now
        stream.seek(0)
        holder = stream.read(200).decode("utf-8", "replace") or "unknown"
        if now - grown > HUNG_S:
            raise ValueError(
                f"source {source!r}: another process ({holder}) tokenizes it, and has "
                f"written nothing for {HUNG_S / 60:.0f} minutes: end that process, or set "
                "data.cache_dir to another folder"
            )
        if now - said > SAY_AGAIN_S:
            said = now
            print(
                f"source {source!r}: waiting for another process that tokenizes it "
                f"({holder}; {size / 1e6:,.1f} MB written)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.1)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it has been renamed or removed
        return 0


def _try_lock(stream) -> bool | None:
    """Lock a file without waiting; return whether that succeeded, None if there are no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unfinished(cache: Path, key: str) -> Path:
    """Return a new folder for a build, whose process is identified by the lock of the key."""
    return cache / f"{key}.unfinished-{socket.gethostname()}-{secrets.token_hex(4)}"


def make_room(cache: Path, key: str, locked: bool, damage: Damaged | None) -> None:
    """Remove a damaged store, and the leftovers of killed builds."""
    with explained(cache, damage):
        if damage:
            print(f"{cache / key} is damaged ({damage}): tokenizing again", file=sys.stderr)
            (cache / key).rename(damaged := unfinished(cache, key))
            _remove(damaged)
        for folder in cache.glob("*.unfinished-*"):
            with contextlib.suppress(OSError):  # another user's, or removed by another process
                if _is_dead(folder, key if locked else ""):
                    shutil.rmtree(folder)


def _remove(store: Path) -> None:
    """Remove a store, or the file or link in its place."""
    if store.is_dir() and not store.is_symlink():
        shutil.rmtree(store)
    else:
        store.unlink()


def _is_dead(folder: Path, locked_key: str) -> bool:
    """Whether the process that made an unfinished folder has ended.

    That process held the lock of its key. Locks may not reach other machines that share the cache
    folder; their builds are considered dead when they have written nothing for a day.
    """
    key, _, rest = folder.name.partition(".unfinished-")
    if rest.startswith(socket.gethostname() + "-"):
        if key == locked_key:
            return True
        with open(folder.parent / f"{key}.lock", "ab") as stream:
            if (free := _try_lock(stream)) is not None:
                return free
    written = [file.stat().st_mtime for file in (folder, *folder.glob("*"))]
    return time.time() - max(written) > LEFTOVER_S
