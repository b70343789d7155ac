"""Convert paths given by a user, in a config key or an option of any program.

Only `local` expands `~`, resolves relative paths and refuses texts that are not local paths. It is
called where a text becomes a path, before any work.
"""

import os
import re
from pathlib import Path

# A URL, even after `Path` has collapsed its two slashes. A folder with such a name is ./NAME:/...
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/")
_MOST_BYTES = 255  # longest file name, on every Linux file system
_MOST_PATH_BYTES = 3800  # Linux allows 4095; leaves room for the files below a folder


def local(text: str | os.PathLike, key: str) -> Path:
    """Return the absolute path of a file or folder that a user named.

    `~` and `~user` are expanded, and a relative path is resolved against the working folder. Links
    and `..` are kept. The path is not looked up: it need not exist, and may be a glob.

    Args:
        key: the config key or option as the user writes it: `model.path`, `--workdir`.

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
    except RuntimeError as error:  # from pathlib if there is no such user or no HOME
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
