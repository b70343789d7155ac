"""Hash files and keep the hashes in the cache folder, so that unchanged files are not read again.

`cache` names a store by the contents of the files that decide its tokens.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from jax_sft.files import regular

SHOW_HASHING = 1_000_000_000  # bytes from which hashing shows a progress bar
# A line of hashes.jsonl: what `_identity` returns, and the hash.
HASH_FIELDS = [str, int, int, int, int, int, str]
SIZE, CHANGED = 3, 5
MAX_HASHES = 16 << 20  # bytes: some 60,000 files; a larger hashes.jsonl is started again
RACY_NS = 2_000_000_000  # coarsest timestamp of a file system: FAT's 2 s


def contents(files: Sequence[Path], cache: Path, progress: bool) -> dict[Path, str]:
    """Return the sha256 of files; one that did not change since it was hashed is not read again.

    A file is identified by path, device, inode, size and both times. Its time of change (ctime)
    cannot be set by a user, so an edit that keeps size and mtime is noticed too. A hash taken
    within 2 s of a change is not kept: a second change could carry the same timestamp (as in git's
    Documentation/technical/racy-git.txt).
    """
    memory = cache / "hashes.jsonl"
    known = _known_hashes(memory)
    identities = {file: _identity(file) for file in files}
    todo = {file: identity for file, identity in identities.items() if identity not in known}
    total = sum(identity[SIZE] for identity in todo.values())
    show = progress and total >= SHOW_HASHING
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=not show) as bar:
        for file, identity in todo.items():
            started = time.time_ns()
            known[identity] = _hash(file, bar)
            if started - identity[CHANGED] > RACY_NS and _identity(file) == identity:
                _remember(memory, identity, known[identity])
    return {file: known[identity] for file, identity in identities.items()}


def _hash(file: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with _readable(file), regular.open_regular(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _identity(file: Path) -> tuple:
    with _readable(file):
        status = file.stat()
    return (
        *(os.path.realpath(file), status.st_dev, status.st_ino),
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    )


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Add the file's name to the error if it is missing or unreadable."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _known_hashes(memory: Path) -> dict[tuple, str]:
    """Read the hashes kept so far; skip damaged lines and a file of another kind."""
    known = {}
    with contextlib.suppress(OSError, ValueError), regular.open_regular(memory) as stream:
        for line in stream.read(MAX_HASHES).splitlines():
            # A killed process leaves half a line.
            with contextlib.suppress(ValueError, RecursionError):
                fields = json.loads(line)
                if isinstance(fields, list) and [*map(type, fields)] == HASH_FIELDS:
                    *identity, digest = fields
                    known[tuple(identity)] = digest
    return known


def _remember(memory: Path, identity: tuple, digest: str) -> None:
    # If it cannot be kept (read-only cache, full disk), the file is hashed again next time.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        if memory.exists() and (not memory.is_file() or memory.stat().st_size > MAX_HASHES):
            memory.unlink()  # all files are hashed again, once
        with open(memory, "a", encoding="ascii") as stream:
            stream.write("\n" + json.dumps([*identity, digest]) + "\n")
