"""Open regular files only, as reading a FIFO, a device or a socket may never end.

Called wherever a file from another source is read.
"""

import errno
import io
import os
import stat

KINDS = {
    **{stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"},
    **{stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"},
}


def open_regular(file: str | os.PathLike, *, follow: bool = True) -> io.BufferedReader:
    """Open a regular file for reading.

    Args:
        follow: whether the file may be a link.

    Raises:
        ValueError: the file is not a regular file.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(file, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise ValueError(f"{file} is a link, not a regular file") from error
        if error.errno == errno.ENXIO:  # how Linux reports a socket
            raise ValueError(f"{file} is a socket, not a regular file") from error
        raise
    try:
        check_mode(file, os.fstat(descriptor).st_mode)
    except ValueError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def check_mode(file: str | os.PathLike, mode: int) -> None:
    """Raise ValueError unless `mode`, from os.stat, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "of another kind")
        raise ValueError(f"{file} is {kind}, not a regular file")
