"""Write sizes and checksums of a folder's files into the folder, and compare them later.

Each process of a run writes `manifest.PROCESS.json` for its own files. A check names every damaged,
missing or foreign file. It reads only the first bytes of a foreign file.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from jax_sft.files.disk import sync

SMALL = 1 << 20  # bytes; smaller files are always read whole when checked
_NAME = re.compile(r"manifest\.(0|[1-9]\d*)\.json")
# Orbax puts the array data that process N writes into ocdbt.process_N.
_PROCESS_FOLDER = re.compile(r"ocdbt\.process_(\d+)")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".dill")
_PICKLE_STARTS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04")
_HASHING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of `manifest.0.json`, and the files of all processes.

    Attributes:
        arrays: {name: {"shape", "dtype", "sum"}} of a step; empty for other folders.
        files: {path inside the folder: (bytes, sha256)}.
        file_of: {path: name of the manifest that lists it}.
    """

    num_processes: int
    arrays: dict[str, dict[str, Any]]
    files: dict[str, tuple[int, str]]
    file_of: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of checking a folder.

    Attributes:
        problems: a line for each problem; if there is any, the folder must not be used.
        warnings: a line for each harmless foreign file.
        manifest: None if it cannot be read.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    manifest: Manifest | None


def name(process: int) -> str:
    """Return the file name of a process's manifest."""
    return f"manifest.{process}.json"


def write(
    folder: Path,
    process: int = 0,
    num_processes: int = 1,
    arrays: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> int:
    """Write the manifest of the files that a process owns, and make files and manifest durable.

    Process 0 owns every file except those under another process's `ocdbt.process_N`.

    Args:
        hashes: {path: sha256} of files that were hashed when they were written.

    Returns:
        Total bytes of these files.

    Raises:
        OSError: a file operation failed.
    """
    sizes, problems = scan(folder)
    if problems:
        raise OSError(f"{folder} changed while it was written: {problems[0]}")
    own = [path for path in sizes if owner(path) == process and not _NAME.fullmatch(path)]
    # Sync the files first, so that a manifest on disk lists only files that are on disk.
    for path in own:
        sync(folder / path)
    known = dict(hashes or {})
    known |= sha256_of(folder, [path for path in own if path not in known])
    body: dict[str, Any] = {
        "process": process,
        "num_processes": num_processes,
        "files": {path: [sizes[path], known[path]] for path in own},
    }
    if process == 0:
        body["arrays"] = dict(arrays or {})
    file = folder / name(process)
    file.write_text(json.dumps(body | {"sha256": _own_sum(body)}, indent=1))
    sync(file)
    for inner in {folder, *(folder / parent for path in own for parent in Path(path).parents)}:
        sync(inner)
    return sum(sizes[path] for path in own)


def owner(path: str) -> int:
    """Return the process that owns a file of a step, and lists it in its manifest."""
    match = next(filter(None, map(_PROCESS_FOLDER.fullmatch, PurePosixPath(path).parts)), None)
    return int(match[1]) if match else 0


def scan(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return ({path of each regular file: bytes}, a line per entry that is no file or folder)."""
    sizes, problems = {}, []
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_symlink():
                    problems.append(f"{path} is a symbolic link to {os.readlink(entry.path)}")
                elif entry.is_dir():
                    folders.append(Path(entry.path))
                elif stat.S_ISREG((status := entry.stat(follow_symlinks=False)).st_mode):
                    sizes[path] = status.st_size
                else:
                    problems.append(f"{path} is neither a file nor a folder")
    return sizes, problems


def read(folder: Path) -> Manifest:
    """Read the manifests of all processes of a folder.

    Raises:
        ValueError: a manifest is missing, damaged or invalid.
    """
    first, process = _read_manifest(folder, 0), 0
    files, file_of = {}, {}
    try:
        for process in range(first["num_processes"]):
            body = first if process == 0 else _read_manifest(folder, process)
            if body["num_processes"] != first["num_processes"]:
                raise ValueError(f"{name(process)} belongs to another save than {name(0)}")
            for path, (size, sha256) in body["files"].items():
                if os.path.isabs(path) or ".." in PurePosixPath(path).parts:
                    raise ValueError(f"{name(process)} names {path!r}, a path outside the folder")
                files[path] = (int(size), str(sha256))
                file_of[path] = name(process)
        return Manifest(first["num_processes"], dict(first["arrays"]), files, file_of)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name(process)} is not a manifest of jax_sft: {error!r}") from None


def _read_manifest(folder: Path, process: int) -> dict[str, Any]:
    file = folder / name(process)
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{name(process)} is missing")
    try:
        body = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON
        raise ValueError(f"{name(process)} is damaged: {error}") from None
    if not isinstance(body, dict) or body.pop("sha256", None) != _own_sum(body):
        raise ValueError(f"{name(process)} is damaged: its own checksum is wrong")
    if body.get("process") != process:
        raise ValueError(f"{name(process)} belongs to process {body.get('process')}")
    return body


def _own_sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check(
    folder: Path, hashes: bool = False, part: tuple[int, int] = (0, 1), progress: str = ""
) -> Check:
    """Compare a folder with its manifests.

    Args:
        hashes: read every file; otherwise compare sizes, and read only files below SMALL bytes.
        part: (i, n): read every n-th file, starting with the i-th.
        progress: name of a progress bar; "" = none.
    """
    try:
        if folder.is_symlink():
            raise ValueError(f"it is a symbolic link to {os.readlink(folder)}")
        manifest = read(folder)
        sizes, problems = scan(folder)
    except (ValueError, OSError) as error:
        return Check((str(error),), (), None)
    warnings = []
    for path, size in sizes.items():
        if path not in manifest.files and not _is_manifest(path, manifest.num_processes):
            harmful = _pickle(folder / path)
            note = f"{path} ({size} bytes) is foreign: no manifest lists it"
            (problems if harmful else warnings).append(note + (harmful and f", and {harmful}"))
        elif path.endswith(_PICKLES):
            problems.append(f"{path} has the name of a pickle file, which can run code when read")
    same_size, changed = compare_sizes(manifest.files, sizes)
    problems += changed
    read_whole = [path for path in same_size if hashes or sizes[path] < SMALL]
    try:
        hashed = sha256_of(folder, read_whole[part[0] :: part[1]], progress)
    except OSError as error:
        return Check((*problems, f"a file cannot be read: {error}"), tuple(warnings), manifest)
    problems += [
        f"{path} is damaged: its sha256 is not that in {manifest.file_of[path]}"
        for path, sha256 in hashed.items()
        if sha256 != manifest.files[path][1]
    ]
    return Check(tuple(problems), tuple(warnings), manifest)


def _is_manifest(path: str, num_processes: int) -> bool:
    match = _NAME.fullmatch(path)
    return bool(match) and int(match[1]) < num_processes


def _pickle(file: Path) -> str:
    """Return why a file may be a pickle, which could run code when read, or ""."""
    if file.name.endswith(_PICKLES):
        return "it has the name of a pickle file, which can run code when read"
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start.startswith(_PICKLE_STARTS):
        return "it starts like a pickle file, which can run code when read"
    return ""


def compare_sizes(
    wanted: Mapping[str, tuple[int, str]], sizes: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Compare file sizes with a manifest; return (paths with the right size, problems).

    Args:
        wanted: {path: (bytes, sha256)}.
        sizes: {path: bytes} of the files that exist.
    """
    same_size, problems = [], []
    for path, (size, _) in wanted.items():
        if path not in sizes:
            problems.append(f"{path} is missing ({size} bytes)")
        elif sizes[path] != size:
            description = "truncated" if sizes[path] < size else "longer than it was"
            problems.append(f"{path} is {description}: {sizes[path]} bytes, not {size}")
        else:
            same_size.append(path)
    return same_size, problems


def sha256_of(folder: Path, paths: Iterable[str], progress: str = "") -> dict[str, str]:
    """Return {path: sha256} of files of a folder, hashed in several threads.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(paths)
    bar = tqdm(total=len(paths), desc=progress, unit="file", delay=1, disable=not progress)
    hashes = {}
    with bar, concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for path, sha256 in zip(paths, pool.map(_sha256, (folder / p for p in paths)), strict=True):
            hashes[path] = sha256
            bar.update()
    return hashes


def _sha256(file: Path) -> str:
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
