"""Write, read and check SHA256SUMS, the last file that is written to an output folder.

The format is that of `sha256sum -c`. The first line is a comment that says what the folder is. A
folder may be replaced while it contains exactly the listed files.
"""

import dataclasses
import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jax_sft.files import manifest
from jax_sft.files.disk import sync

NAME = "SHA256SUMS"
_ABOUT = "# jax_sft "
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # those of GNU's sha256sum
_MOST_BYTES = 64 << 20  # a larger file was not written by `write`


@dataclasses.dataclass(frozen=True)
class Sums:
    """A folder's SHA256SUMS.

    Attributes:
        kind: what the folder is: "export" or "conversion".
        about: further details, e.g. {"step": 3}.
        files: {path inside the folder: (bytes, sha256)}.
    """

    kind: str
    about: dict[str, Any]
    files: dict[str, tuple[int, str]]


def write(
    folder: Path, kind: str, about: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """List all files of a folder, and wait until they are on disk.

    Args:
        known: {path: sha256} of files that were hashed while they were written.

    Raises:
        OSError: a file operation failed.
    """
    files, folders, problems = _scan(folder)
    files.pop(NAME, None)
    if problems:
        raise OSError(f"{folder} changed while it was written: {problems[0]}")
    hashes = {path: sha256 for path, sha256 in (known or {}).items() if path in files}
    hashes |= manifest.sha256_of(folder, [path for path in files if path not in hashes])
    head = {"kind": kind, "about": dict(about), "sizes": files}
    lines = [_ABOUT + json.dumps(head)]
    for path in sorted(files):
        escaped = "".join(_ESCAPES.get(char, char) for char in path)
        lines.append(f"{'' if escaped == path else chr(92)}{hashes[path]}  {escaped}")
    file = folder / NAME
    file.write_bytes(os.fsencode("\n".join(lines) + "\n"))
    for path in (*files, NAME, *folders, "."):
        sync(folder / path)


def read(folder: Path) -> Sums | None:
    """Read a folder's SHA256SUMS; None = the file is missing or not from `write`."""
    file = folder / NAME
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return None
        content = file.read_bytes()
    except OSError:
        return None
    first, *lines = os.fsdecode(content).removesuffix("\n").split("\n")
    try:
        head = json.loads(first.removeprefix(_ABOUT)) if first.startswith(_ABOUT) else {}
        files = dict(_parse(line, head["sizes"]) for line in lines)
        return Sums(str(head["kind"]), dict(head["about"]), files)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def check(
    folder: Path,
    sums: Sums,
    progress: str = "",
    hashes: bool = True,
    skip: Collection[str] = (),
) -> list[str]:
    """Compare a folder with its SHA256SUMS; return a line for each difference.

    Args:
        progress: name of a progress bar; "" = none.
        hashes: read every file; otherwise only names and sizes are compared.
        skip: paths in the folder that are ignored.

    Raises:
        OSError: a file cannot be read.
    """
    files, folders, problems = _scan(folder, skip)
    parents = {str(parent) for path in sums.files for parent in PurePosixPath(path).parents}
    foreign = [path for path in files if path not in sums.files and path != NAME]
    foreign += [f"{path}/" for path in folders if path not in parents]
    problems += [f"{path} is foreign: {NAME} does not list it" for path in sorted(foreign)]
    same_size, changed = manifest.compare_sizes(sums.files, files)
    problems += changed
    hashed = manifest.sha256_of(folder, same_size, progress) if hashes else {}
    return problems + [
        f"{path} was changed: its sha256 is not that in {NAME}"
        for path, sha256 in hashed.items()
        if sha256 != sums.files[path][1]
    ]


def _parse(line: str, sizes: Mapping[str, int]) -> tuple[str, tuple[int, str]]:
    """Return (path, (bytes, sha256)) of a line of SHA256SUMS.

    Raises:
        ValueError, KeyError: the line is not from `write`.
    """
    match = _LINE.fullmatch(line)
    if not match:
        raise ValueError(line)
    path = match[3]
    if match[1]:
        back = {escaped: char for char, escaped in _ESCAPES.items()}
        path = re.sub(r"\\.", lambda escape: back[escape[0]], path)
    if os.path.isabs(path) or {"..", "."} & {*PurePosixPath(path).parts}:
        raise ValueError(f"{path} is outside the folder")
    return path, (int(sizes[path]), match[2])


def _scan(folder: Path, skip: Collection[str] = ()) -> tuple[dict[str, int], list[str], list[str]]:
    """Return ({path of each file: bytes}, paths of folders, a line per entry that is neither)."""
    files, folders, problems = {}, [], []
    unvisited = [folder]
    while unvisited:
        with os.scandir(unvisited.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path).relative_to(folder).as_posix()
                if path in skip:
                    continue
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                    unvisited.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    files[path] = status.st_size
                else:
                    problems.append(f"{path} is foreign: neither a file nor a folder")
    return files, folders, problems
