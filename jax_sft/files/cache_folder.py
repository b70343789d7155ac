"""Folders of the caches of this user, and a check that nobody else can write to them."""

import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path

from jax_sft.files import paths

_UNMAPPED = 65534  # owner of a folder that a container sees and whose user it does not know


def of(cache_dir: str | os.PathLike) -> Path:
    """Return the folder that `data.cache_dir` names, or the default one where it names none.

    Raises:
        ValueError: as `paths.local` and `default`.
    """
    return paths.local(cache_dir, "data.cache_dir") if os.fspath(cache_dir) else default()


def default() -> Path:
    """Return $XDG_CACHE_HOME/jax_sft, or ~/.cache/jax_sft.

    A user without a home folder (a container started with any user id) has a private folder beside
    the other temporary files.

    Raises:
        ValueError: that folder is another user's.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification: a relative path is to be ignored
        return Path(given) / "jax_sft"
    try:
        return Path("~/.cache/jax_sft").expanduser()
    except RuntimeError:  # neither HOME nor an entry in the password database
        return _private(Path(tempfile.gettempdir()) / f"jax_sft-{os.getuid()}")


def _private(folder: Path) -> Path:
    """Make a folder that only this user may enter, in one that everybody writes to."""
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ValueError(
            f"there is no home folder for caches, and {folder} is not a private folder of this "
            "user: set HOME, or XDG_CACHE_HOME"
        )
    return folder


def untrusted(folder: Path) -> str:
    """Say why somebody else could put files into a folder, as sshd does before it reads keys.

    The folder must belong to this user or root, and each folder above to one of them; none may be
    writable by others, but for folders with the sticky bit such as /tmp. A group that holds this
    user alone counts as the user.

    Returns:
        The reason with the remedy; "" = nobody else could.

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
    """Whether a group has no member but this user: its own group, or root's."""
    if gid == 0:
        return True
    try:
        ours, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        ours.pw_gid == gid and group.gr_name == ours.pw_name and {*group.gr_mem} <= {ours.pw_name}
    )
