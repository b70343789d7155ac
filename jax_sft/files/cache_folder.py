"""Locate the cache folders of this user, and check that nobody else can write to them."""

import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path

from jax_sft.files import paths

_UNMAPPED = 65534  # how a container sees the owner of a folder if it does not know the user


def of(cache_dir: str | os.PathLike) -> Path:
    """Return the folder of `data.cache_dir`, or the default folder if it is empty.

    Raises:
        ValueError: see `paths.local` and `default`.
    """
    return paths.local(cache_dir, "data.cache_dir") if os.fspath(cache_dir) else default()


def default() -> Path:
    """Return $XDG_CACHE_HOME/jax_sft, or ~/.cache/jax_sft.

    A user without a home folder (a container started with an arbitrary user id) gets a private
    folder in the folder for temporary files.

    Raises:
        ValueError: that folder is not a private folder of this user.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification says to ignore a relative path
        return Path(given) / "jax_sft"
    try:
        return Path("~/.cache/jax_sft").expanduser()
    except RuntimeError:  # neither HOME nor an entry in the password database
        return _private(Path(tempfile.gettempdir()) / f"jax_sft-{os.getuid()}")


def _private(folder: Path) -> Path:
    """Create a folder that only this user may enter, in a folder that all users can write to."""
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ValueError(
            f"there is no home folder for caches, and {folder} is not a private folder of this "
            "user: set HOME, or XDG_CACHE_HOME"
        )
    return folder


def untrusted(folder: Path) -> str:
    """Return why another user could put files into a folder, or "". sshd checks keys like this.

    The folder and every folder above it must belong to this user or root (or, above it, to an
    unmapped user). None may be writable by others, except parents with the sticky bit such as
    /tmp. A group with this user as its only member counts as the user.

    Returns:
        The reason with the remedy; "" = no other user could.

    Raises:
        OSError: a folder cannot be examined.
    """
    for number, place in enumerate([(path := folder.resolve()), *path.parents]):
        status = place.stat()
        trusted = {os.geteuid(), 0} | ({_UNMAPPED} if number else set())
        if status.st_uid not in trusted:
            return f"{place} belongs to user {_user(status.st_uid)}: use a folder of your own"
        if number and status.st_mode & stat.S_ISVTX:
            continue
        by_group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
        if by_group or status.st_mode & stat.S_IWOTH:
            mode = stat.S_IMODE(status.st_mode)
            return f"others may write to {place} (mode {mode:o}): chmod go-w, or use another folder"
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_private(gid: int) -> bool:
    """Whether a group is root's, or this user's own group without other members."""
    if gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        user.pw_gid == gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}
    )
