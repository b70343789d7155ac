"""List the tokenized sources of a cache folder and remove the least recently used.

Called by `data.tokens.cache` after a build, and by the command `jax_sft.cache`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

STORE = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tokenized source on disk.

    Attributes:
        names: of its data files.
        num_tokens: 0 if that cannot be read.
        used: when it was last opened, in seconds since the epoch.
    """

    folder: Path
    names: list[str]
    num_tokens: int
    num_bytes: int
    used: float


def entries(cache: Path) -> list[Entry]:
    """Return the stores of a cache folder, the least recently used first."""
    stores = []
    with contextlib.suppress(FileNotFoundError):
        for folder in cache.iterdir():
            if STORE.fullmatch(folder.name) and (folder / "meta.json").is_file():
                with contextlib.suppress(OSError):  # another process has removed it
                    stores.append(_entry(folder))
    return sorted(stores, key=lambda entry: entry.used)


def _entry(folder: Path) -> Entry:
    sizes = {file.name: file.lstat().st_size for file in folder.iterdir()}
    try:
        names = [
            str(file["name"]) for file in json.loads((folder / "meta.json").read_text())["files"]
        ]
    except (ValueError, LookupError, TypeError, RecursionError):  # damaged, or of another version
        names = []
    used = folder.stat().st_mtime
    return Entry(folder, names, sizes.get("ids", 0) // 4, sum(sizes.values()), used)


def touch(folder: Path) -> None:
    """Record that a store is used now; a folder of another user keeps its time."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def remove(entry: Entry) -> bool:
    """Remove a store unless it is, or may be, in use; return whether it is gone.

    `open_store` holds a shared lock on the ids for as long as an array of the store is alive.
    """
    try:
        with contextlib.ExitStack() as stack:
            if (entry.folder / "ids").exists():  # a store without ids is damaged and unused
                stream = stack.enter_context(open(entry.folder / "ids", "r+b"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            name = f"{entry.folder.name}.unfinished-{socket.gethostname()}-{secrets.token_hex(4)}"
            gone = entry.folder.rename(entry.folder.parent / name)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def make_room(cache: Path, most_bytes: float, keep: Path) -> list[Entry]:
    """Remove the least recently used stores until `most_bytes` suffice; return the removed ones."""
    stores = entries(cache)
    total = sum(entry.num_bytes for entry in stores)
    removed = []
    for entry in stores:
        if total <= most_bytes:
            break
        if entry.folder != keep and remove(entry):
            removed.append(entry)
            total -= entry.num_bytes
    return removed
