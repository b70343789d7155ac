"""Where this user's caches are: tokenized data, compiled programs."""

import os
import stat
import tempfile
from pathlib import Path

from jax_sft import paths


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
