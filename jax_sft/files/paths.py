"""Paths that a user gave: in a config key or an option of any program.

`local` is the one place that expands `~`, resolves relative paths and refuses what is no path of
this machine. It is called where a text becomes a path, before any work.
"""

import os
import re
from pathlib import Path

# A URL, also after `Path` has made one slash of two; a folder of such a name is ./NAME:/...
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/")
_MOST_BYTES = 255  # of one name, on every file system of Linux
_MOST_PATH_BYTES = 3800  # Linux takes 4095, and what is written below a folder has to fit


def local(text: str | os.PathLike, key: str) -> Path:
    """Return the absolute path of a file or folder that a user named.

    `~` and `~user` are expanded, a relative path is one below the working folder; links and `..`
    stay as they are. Nothing is looked up: the path need not exist, and may be a glob.

    Args:
        key: of the config, or the option, as the user writes it: `--workdir`, `model.path`.

    Raises:
        ValueError: an empty text, a URL, a NUL byte, a name or a path that is too long, or a home
            folder that is not known.
    """
    text = os.fspath(text)
    given = f"{key} = {text!r}"
    if not text:
        raise ValueError(f"{key} is empty: name a path")
    if _URL.match(text):
        raise ValueError(
            f"{given} is a URL, and only local paths are supported: copy the files or mount the "
            f"storage, and name a folder (./{text.strip().partition(':')[0]}:/... if it is one)"
        )
    if "\0" in text:
        raise ValueError(f"{given} contains a NUL byte, which no path can")
    if any(len(os.fsencode(name)) > _MOST_BYTES for name in text.split("/")):
        raise ValueError(
            f"{key}: a name of over {_MOST_BYTES} bytes is no file's: {text[:80]!r}..."
        )
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # pathlib's, where there is no such user or no HOME
        name = text.partition("/")[0]
        raise ValueError(
            f"{given}: the home folder {name} is not known here: "
            + ("set HOME, or " if name == "~" else "")
            + "write the path without it"
        ) from error
    if (num_bytes := len(os.fsencode(path))) > _MOST_PATH_BYTES:
        raise ValueError(
            f"{key}: a path of {num_bytes} bytes ({str(path)[:80]}...) is too long, use at most "
            f"{_MOST_PATH_BYTES}"
        )
    return path
