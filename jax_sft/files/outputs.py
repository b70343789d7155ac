"""Folders and files that a user asks for: where they may be, and what they may replace.

Every program that takes an output path asks here. Nothing is removed but what our programs wrote
and nobody changed, known by its SHA256SUMS (`sums`); a new folder is complete before an old one
goes. A killed program's unfinished folder is removed by the next one that writes to the same place.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_sft.files import owner, paths, sums
from jax_sft.files.disk import sync
from jax_sft.runtime.text import at_most

EXPORT, CONVERSION = "export", "conversion"
_OWNER = "owner.json"  # in the folder that an unfinished output is written in
_NEW, _OLD = "new", "old"
_RUN = "the folder of a run"
_RUN_FILES = ("run.lock", "metrics.jsonl", "data_report.json")  # the first as soon as it starts
_SHOWN = 5  # files named in a message
_MOST_NAME_BYTES = 200
_SPARE_BYTES = 100_000_000  # for tokenizer files and headers
_MOST_CONFIG_BYTES = 16 << 20
_MODEL_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder that may be written.

    Attributes:
        out: all links resolved.
        stamps: of the files of an older output that is to be replaced: they change with them.
    """

    out: Path
    kind: str
    stamps: frozenset[tuple[Any, ...]] = frozenset()


# ---- where an output may be ----------------------------------------------------------------------


def check(
    path: str | Path,
    kind: str,
    *,
    overwrite: bool = False,
    reads: Iterable[Path] = (),
    key: str = "--out",
    quick: bool = False,
    remedy: str = "Choose another folder",
) -> Place:
    """Decide whether a folder may be written.

    It may be if it is new or empty, or, with `overwrite`, if all that it holds was written by the
    same kind of program and is unchanged.

    Args:
        kind: EXPORT or CONVERSION.
        reads: folders that are read for it, such as the checkpoints and the base model.
        key: the option that named it.
        quick: compare names and sizes of an older output, and leave the contents for later.
        remedy: for a folder that holds something else.

    Raises:
        ValueError: it may not; why, and what to do.
    """
    path = paths.local(path, key)
    out = Path(os.path.realpath(path))
    shown = str(path) if path == out else f"{path} ({out})"
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise ValueError(f"{shown} is a file: choose another name for the folder")
        _refuse_place(out, shown, [Path(os.path.realpath(each)) for each in reads])
        if not out.is_dir() or not _entries(out):
            return Place(out, kind)
        stamps = _stamps(out)
        problem = _unlike_ours(out, kind, quick or not overwrite)
    except OSError as error:
        raise ValueError(f"{shown} cannot be used: {error}") from error
    if problem:
        raise ValueError(f"{shown} {problem}. {remedy}")
    if not overwrite:
        raise ValueError(
            f"{shown} is not empty: it holds an older {kind}. Choose another folder, or replace "
            "that one with --overwrite"
        )
    return Place(out, kind, stamps)


def claim(path: str | Path, mark: str, key: str) -> Path:
    """Make a folder for a program's own use, in which it may remove what it likes.

    Args:
        mark: the file that tells such a folder from others.
        key: the option that named it.

    Raises:
        ValueError: the folder holds something else, or cannot be made.
    """
    folder = paths.local(path, key)
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
            raise ValueError(
                f"{key} = {folder} is not empty and not of this program (it has no {mark}), which "
                "removes files in it: name a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).touch()
    except OSError as error:
        raise ValueError(f"{key} = {folder} cannot be used: {error}") from error
    return folder


def check_room(out: Path, nbytes: int) -> None:
    """Make the folder that an output is to be in, and compare its size with the free space.

    Raises:
        ValueError: the folder cannot be made, or there is no room.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(_beside(out)).free
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error}") from error
    if free < nbytes + _SPARE_BYTES:
        raise ValueError(
            f"{out} will have {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {out.parent}"
        )


def check_file(path: str | Path, is_ours: Callable[[bytes], bool], key: str) -> Path:
    """Decide whether a file may be written; return it, with all links resolved.

    Args:
        is_ours: whether a file that begins so was written by the same program.
        key: the option that named it.

    Raises:
        ValueError: it may not; why.
    """
    path = paths.local(path, key)
    out = Path(os.path.realpath(path))
    shown = f"{key} = {path}"
    try:
        if out.is_dir():
            raise ValueError(f"{shown} is a folder: name a file")
        if out.exists() and not out.is_file():
            raise ValueError(f"{shown} is not a regular file: choose another name")
        _refuse_place(out, shown, [])
        if out.exists():
            with open(out, "rb") as stream:
                start = stream.read(4096)
            if start and not is_ours(start):
                raise ValueError(
                    f"{shown} exists, and this program did not write it: choose another name"
                )
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error}") from error
    return out


def write_file(file: Path, parts: Iterable[str]) -> None:
    """Write a text file that appears when it is complete.

    Args:
        file: what `check_file` returned.

    Raises:
        ValueError: it cannot be written.
    """
    unfinished = file.with_name(f"{_prefix(file)}{secrets.token_hex(4)}")
    try:
        try:
            with open(unfinished, "w", encoding="utf-8") as stream:
                stream.writelines(parts)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error


def is_page(start: bytes) -> bool:
    """Whether a file that begins so is an HTML page of a program of ours."""
    return b'<meta name="generator" content="jax_sft">' in start


def _refuse_place(out: Path, shown: str, reads: Iterable[Path]) -> None:
    """Refuse a place that is, holds or lies in something that must stay as it is.

    Raises:
        ValueError: it is.
    """
    home = os.path.expanduser("~")
    is_home = os.path.isabs(home) and Path(os.path.realpath(home)).is_relative_to(out)
    if is_home or out == out.parent:
        raise ValueError(f"{shown} is or holds your home folder: choose another folder")
    if ".git" in out.parts:
        raise ValueError(f"{shown} is in a git repository's own files: choose another folder")
    for folder in reads:
        if folder.is_relative_to(out):
            verb = "is" if folder == out else "holds"
            raise ValueError(f"{shown} {verb} {folder}, which is read: choose another folder")
    if (what := _describe(out)) and not sums.read(out):
        raise ValueError(f"{shown} is {what}: choose another folder")
    for parent in out.parents:
        what = _describe(parent)
        if what == _RUN:
            return  # exports may be there; what the run itself is in does not matter
        if what:
            raise ValueError(f"{shown} is in {what}, {parent}: choose a folder outside of it")


def _describe(folder: Path) -> str:
    """Say what a folder is that is a run's, or that nothing else belongs into; "" = neither."""
    if _is_run(folder):
        return _RUN
    if _is_checkpoints(folder):
        return "a checkpoint folder"
    if os.path.isfile(folder / "manifest.0.json"):
        return "a part of a checkpoint folder"
    if old := sums.read(folder):
        return _with_article(old.kind)
    if _is_model(folder):
        return "a model folder"
    if os.path.isdir(folder / "blobs") and os.path.isdir(folder / "snapshots"):
        return "a model in the hub's cache"
    return ""


def _is_run(folder: Path) -> bool:
    inner = folder / "checkpoints"
    files = (folder / name for name in _RUN_FILES)
    return os.path.isdir(inner) and (
        os.path.isdir(inner / "model_files") or any(map(os.path.isfile, files))
    )


def _is_checkpoints(folder: Path) -> bool:
    if os.path.isdir(folder / "model_files"):
        return True
    return folder.name == "checkpoints" and _is_run(folder.parent)


def _is_model(folder: Path) -> bool:
    if any(os.path.exists(folder / name) for name in _MODEL_FILES):
        return True
    file = folder / "config.json"
    try:
        if not os.path.isfile(file) or file.stat().st_size > _MOST_CONFIG_BYTES:
            return False
        config = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError):
        return any(folder.glob("*.safetensors"))
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


def _unlike_ours(folder: Path, kind: str, quick: bool) -> str:
    """Say why a folder that is not empty cannot be replaced; "" = it can.

    Raises:
        OSError: it cannot be read.
    """
    old = sums.read(folder)
    if old and old.kind != kind:
        return f"holds {_with_article(old.kind)}, not {_with_article(kind)}"
    if not old and os.path.lexists(folder / ".git"):
        return "is a git checkout"
    if not old:
        names = [f"{path.name}{'/' if path.is_dir() else ''}" for path in _entries(folder)]
        return f"holds files that are not of {_with_article(kind)}: {_listed(names)}"
    skip = {path.name for path in folder.iterdir() if _is_unfinished(path)}
    progress = "" if quick else "checking old files"
    if problems := sums.check(folder, old, progress, not quick, skip):
        return f"is not as it was written, and stays: {_listed(problems)}"
    return ""


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind == EXPORT else f"a {kind}"


def _listed(lines: Sequence[str]) -> str:
    return "; ".join(at_most(lines, _SHOWN))


def _entries(folder: Path) -> list[Path]:
    """List a folder, without unfinished outputs of ours."""
    return sorted(path for path in folder.iterdir() if not _is_unfinished(path))


def _stamps(folder: Path) -> frozenset[tuple[Any, ...]]:
    """Return of each file what changes when the file does, and cannot be set by its owner."""
    stamps = []
    for root, folders, files in os.walk(folder):
        if root == str(folder):
            folders[:] = [name for name in folders if not _is_unfinished(folder / name)]
        for name in (*folders, *files):
            path = os.path.join(root, name)
            found = os.lstat(path)
            is_folder = stat.S_ISDIR(found.st_mode)
            stamps.append(
                (path, found.st_ino, not is_folder and (found.st_size, found.st_ctime_ns))
            )
    return frozenset(stamps)


# ---- an output while it is written ---------------------------------------------------------------


@contextlib.contextmanager
def unfinished(out: Path, say: Callable[[str], object] = print) -> Iterator[Path]:
    """Yield a new folder to write an output in, for `put_in_place`; it is removed at the end.

    Args:
        out: of a Place.
        say: takes a line about what a killed program left.

    Raises:
        OSError: the file system refused something.
    """
    remove_leftovers(out, say)
    staging = _beside(out) / f"{_prefix(out)}{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        (staging / _OWNER).write_text(json.dumps(owner.this_process() | {"out": out.name}))
        (staging / _NEW).mkdir()
        yield staging / _NEW
    finally:
        _remove_staging(staging, out)


def put_in_place(new: Path, place: Place) -> None:
    """Give a complete folder its name, in the place of an older output that is as it was written.

    Args:
        new: what `unfinished` gave, with its SHA256SUMS.

    Raises:
        ValueError: somebody changed the older output, or took the name, since `check`.
        OSError: the file system refused something; what had the name still has it.
    """
    out, staging = place.out, new.parent
    is_inside = staging.parent == out
    if out.is_dir() and _entries(out):
        if not place.stamps:
            raise ValueError(f"{out} was written by another program meanwhile")
        if _stamps(out) != place.stamps and (problem := _unlike_ours(out, place.kind, quick=False)):
            raise ValueError(f"{out} {problem}. Choose another folder")
    if is_inside:
        _move_inside(new, out)
        return
    old = staging / _OLD
    if place.stamps and out.is_dir():
        os.rename(out, old)
    try:
        os.rename(new, out)  # also over an empty folder
    except OSError as error:
        if old.exists() and not out.exists():
            os.rename(old, out)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ValueError(f"{out} was written by another program meanwhile") from error
        raise
    sync(out.parent)


def _move_inside(new: Path, out: Path) -> None:
    """Move the files of an output into a folder that cannot be renamed itself: a mount point."""
    old = new.parent / _OLD
    old.mkdir()
    names = sorted(new.iterdir(), key=lambda path: path.name == sums.NAME)  # the last of all
    with contextlib.ExitStack() as undo:  # whatever ends this early, a request to stop included
        for path, to in [*((p, old) for p in _entries(out)), *((p, out) for p in names)]:
            os.rename(path, to / path.name)
            undo.callback(os.rename, to / path.name, path)
        undo.pop_all()
    sync(out)


def remove_leftovers(out: Path, say: Callable[[str], object] = print) -> None:
    """Remove what killed programs left of the outputs that they were writing to this place.

    Args:
        out: of a Place.
        say: takes a line for each.

    Raises:
        OSError: the file system refused something.
    """
    for folder in (out.parent, out):
        names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else []
        for path in sorted(folder / name for name in names if name.startswith(_prefix(out))):
            if not _is_unfinished(path) or not _is_dead(path, out):
                continue
            if restored := _remove_staging(path, out):
                say(f"put {out} back: a program was killed while it replaced it")
            if not restored or path.exists():
                verb = "left" if path.exists() else "removed"
                say(f"{verb} {path}, which a program that was killed had not finished")


def _remove_staging(staging: Path, out: Path) -> bool:
    """Remove the folder of an unfinished output; return whether the old output was put back."""
    old, restored = staging / _OLD, False
    if old.is_dir() and staging.parent != out and not os.path.lexists(out):
        os.rename(old, out)
        restored = True
    elif old.is_dir():
        if not sums.read(out):
            return False  # `_move_inside` was killed: parts of the old output are in both
        _remove_listed(old)
    shutil.rmtree(staging / _NEW, ignore_errors=True)
    with contextlib.suppress(OSError):  # what is in it that we did not write stays
        if os.listdir(staging) == [_OWNER]:
            (staging / _OWNER).unlink()
        staging.rmdir()
    return restored


def _remove_listed(folder: Path) -> None:
    """Remove the files of an old output that its SHA256SUMS lists; others stay."""
    found = sums.read(folder)
    inner = {folder}
    with contextlib.suppress(OSError):
        for path in found.files if found else ():
            (folder / path).unlink(missing_ok=True)
            inner |= {folder / parent for parent in Path(path).parents}
        (folder / sums.NAME).unlink(missing_ok=True)
        for path in sorted(inner, reverse=True):
            path.rmdir()


def _beside(out: Path) -> Path:
    """Return the folder to write an unfinished output in: on the same file system, writable."""
    if out.is_dir() and (_is_mount(out) or not os.access(out.parent, os.W_OK)):
        return out
    return out.parent


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder, which then cannot be renamed."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc
        return os.path.ismount(folder)
    # Bind mounts, as containers have them, are on the same device as what they are in.
    return any(line.split()[4] == str(folder) for line in mounts.splitlines())


def _prefix(out: Path) -> str:
    """Return how the names of unfinished outputs of a place begin."""
    return f".{os.fsdecode(os.fsencode(out.name)[:_MOST_NAME_BYTES])}.jax_sft-"


def _is_unfinished(path: Path) -> bool:
    """Whether a folder is what `unfinished` makes."""
    is_named = re.fullmatch(r"\..*\.jax_sft-[0-9a-f]{8}", path.name, re.DOTALL)
    return bool(is_named) and not path.is_symlink() and os.path.isfile(path / _OWNER)


def _is_dead(staging: Path, out: Path) -> bool:
    """Whether the program that wrote an unfinished output has ended."""
    try:
        found = json.loads((staging / _OWNER).read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    if not isinstance(found, dict) or found.get("out") != out.name:
        return False
    running = owner.is_running(found)
    if running is None:  # on another host, or in another container
        files = (staging / _OWNER, *(staging / _NEW).rglob("*"))
        newest = max(path.lstat().st_mtime for path in files)
        return newest < time.time() - owner.DAY_S
    return not running
