"""Write files whole and make them durable.

Called by everything that writes a checkpoint, an export or a cache.
"""

import os
import uuid
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(stream: BinaryIO, content: bytes) -> None:
    """Write all bytes to an unbuffered stream, whose `write` may write only a part.

    Raises:
        OSError: a file operation failed.
    """
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes into a file, starting at an offset.

    Raises:
        OSError: a file operation failed.
    """
    left = content
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def probe_folder(folder: Path) -> None:
    """Create the folder if it is missing, and write, sync and remove a small file in it.

    Raises:
        OSError: one of these operations failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{uuid.uuid4().hex}.probe"
    try:
        file.write_bytes(bytes(4096))
        sync(file)
    finally:
        file.unlink(missing_ok=True)
