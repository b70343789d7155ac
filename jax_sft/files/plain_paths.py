"""Provide folder names that Orbax and TensorStore read as plain paths.

Orbax treats a path as a glob pattern when it looks for its own files, and as a bucket if it begins
with /gs/ or /s3/. TensorStore changes backslashes and refuses names that are not UTF-8. A folder
with such a name is opened, and Orbax gets the path of its descriptor: /proc/self/fd/N.
"""

import fcntl
import os
import re
import resource
import threading
import zlib
from pathlib import Path

_PLAIN = re.compile(r"[\w./ ,:;=@%+~#$&!'\"()^-]+")
_BUCKETS = re.compile(r"/+(gs|s3|az|hf)(/|$)")
_DESCRIPTORS = Path("/proc/self/fd")

# {folder: (its device and inode, descriptor)}. A process has a handful, open until it ends.
_opened: dict[Path, tuple[tuple[int, int], int]] = {}
_opening = threading.Lock()


def is_plain(folder: Path) -> bool:
    """Whether Orbax and TensorStore read the name of a folder as it is."""
    text = str(folder)
    plain = text.isprintable() and _PLAIN.fullmatch(text) and not _BUCKETS.match(text)
    return bool(plain)


def plain(folder: Path) -> Path:
    """Return a path of an existing folder that is safe for Orbax and TensorStore.

    The path may be valid in this process only.

    Raises:
        OSError: the folder is missing, or cannot be opened.
    """
    folder = folder.absolute()
    if is_plain(folder):
        return folder
    if not _DESCRIPTORS.is_dir():
        raise OSError(
            f"{folder} has a name that Orbax cannot store under on this system: use letters, "
            "digits, blanks and ._- only"
        )
    with _opening:
        status = os.stat(folder)
        current = (status.st_dev, status.st_ino)
        before, descriptor = _opened.get(folder, (None, -1))
        if before != current:  # new, or removed and created again
            if before:
                os.close(descriptor)
            descriptor = _open(folder)
            _opened[folder] = (current, descriptor)
    return _DESCRIPTORS / str(descriptor)


def _open(folder: Path) -> int:
    """Open a folder under a descriptor number that is derived from its name.

    Orbax compares the paths of all processes, so each has to use the same number. The numbers are
    above those in use, and below the usual limit of 1024 or a lower limit of the process.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = 1000 if limit == resource.RLIM_INFINITY else min(1000, limit)
    first = most * 3 // 5
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        number = first + zlib.crc32(os.fsencode(folder)) % (most - first)
        return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, number)
    finally:
        os.close(opened)


def shown(text: str) -> str:
    """Return a message of Orbax or TensorStore with descriptor paths replaced by folder names."""
    with _opening:
        for folder, (_, descriptor) in _opened.items():
            text = re.sub(rf"{_DESCRIPTORS}/{descriptor}\b", lambda _, to=folder: str(to), text)
    return text
