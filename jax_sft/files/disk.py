"""Write files whole and make them durable.

Called by everything that writes a checkpoint, an export or a cache.
"""

import os
import uuid
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_all(stream: BinaryIO, content: bytes) -> None:
    """Write all bytes to an unbuffered stream: one call may write less than it is given.

    Raises:
        OSError: the file system refused something.
    """
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes into a file, from an offset on.

    Raises:
        OSError: the file system refused something.
    """
    left = content
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def probe_folder(folder: Path) -> None:
    """Make the folder if it is missing, and write, sync and remove a small file in it.

    Raises:
        OSError: something of this is not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{uuid.uuid4().hex}.probe"
    try:
        file.write_bytes(bytes(4096))
        sync(file)
    finally:
        file.unlink(missing_ok=True)
