"""Check and write output folders and files: where they may be, and what they may replace.

Every program that accepts an output path calls this. It removes only unchanged outputs of jax_sft
programs, recognized by their SHA256SUMS (`sums`). A new folder is complete before it replaces an
old one. The next program that writes to the same path removes the unfinished folder of a killed
one.
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
_OWNER = "owner.json"  # in the staging folder of an unfinished output
_NEW, _OLD = "new", "old"
_RUN = "the folder of a run"
_RUN_FILES = ("run.lock", "metrics.jsonl", "data_report.json")  # a starting run has run.lock
_SHOWN = 5  # files named in a message
_MOST_NAME_BYTES = 200
_SPARE_BYTES = 100_000_000  # reserve for tokenizer files and headers
_MOST_CONFIG_BYTES = 16 << 20
_MODEL_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """An output folder that may be written.

    Attributes:
        out: path with all links resolved.
        stamps: stamps of the files of an older output to be replaced, see `_stamps`.
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
    """Check that an output folder may be written.

    The folder may be new or empty. With `overwrite`, it may also hold an unchanged output of the
    same kind and nothing else.

    Args:
        kind: EXPORT or CONVERSION.
        reads: folders that are read for the output, such as the checkpoints and the base model.
        key: the option that named the folder.
        quick: compare only names and sizes of an older output, and check the contents later.
        remedy: advice in the message about a folder that holds something else.

    Raises:
        ValueError: the folder may not be written; the message says why and what to do.
    """
    path = paths.local(path, key)
    out = Path(os.path.realpath(path))
    shown = str(path) if path == out else f"{path} ({out})"
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise ValueError(f"{shown} is a file: choose another name for the folder")
        _refuse_place(out, shown, [Path(os.path.realpath(folder)) for folder in reads])
        if not out.is_dir() or not _entries(out):
            return Place(out, kind)
        stamps = _stamps(out)
        problem = _why_kept(out, kind, quick or not overwrite)
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
    """Create a folder for a program's own use, in which it may remove any file.

    Args:
        mark: name of the file that marks such a folder.
        key: the option that named the folder.

    Raises:
        ValueError: the folder holds something else, or cannot be created.
    """
    folder = paths.local(path, key)
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
            raise ValueError(
                f"{key} = {folder} is not empty and was not written by this program (it has "
                f"no {mark}), which removes files in it: name a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).touch()
    except OSError as error:
        raise ValueError(f"{key} = {folder} cannot be used: {error}") from error
    return folder


def check_room(out: Path, nbytes: int) -> None:
    """Create the parent folder of an output, and check that the output fits in the free space.

    Raises:
        ValueError: the folder cannot be created, or has too little free space.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(_staging_parent(out)).free
    except OSError as error:
        raise ValueError(f"{out} cannot be created: {error}") from error
    if free < nbytes + _SPARE_BYTES:
        raise ValueError(
            f"{out} will have {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {out.parent}"
        )


def check_file(path: str | Path, is_own_start: Callable[[bytes], bool], key: str) -> Path:
    """Check that an output file may be written; return its path with all links resolved.

    Args:
        is_own_start: whether a file with these first bytes was written by the same program.
        key: the option that named the file.

    Raises:
        ValueError: the file may not be written; the message says why.
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
            if start and not is_own_start(start):
                raise ValueError(
                    f"{shown} exists, and this program did not write it: choose another name"
                )
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error}") from error
    return out


def write_file(file: Path, parts: Iterable[str]) -> None:
    """Write a text file that appears only when it is complete.

    Args:
        file: path that `check_file` returned.

    Raises:
        ValueError: the file cannot be written.
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
    """Whether a file with these first bytes is an HTML page of a jax_sft program."""
    return b'<meta name="generator" content="jax_sft">' in start


def _refuse_place(out: Path, shown: str, reads: Iterable[Path]) -> None:
    """Refuse an output path that is, contains or is in something that must not change.

    Raises:
        ValueError: the path is refused; the message says why.
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
    if (description := _describe(out)) and not sums.read(out):
        raise ValueError(f"{shown} is {description}: choose another folder")
    for parent in out.parents:
        description = _describe(parent)
        if description == _RUN:
            return  # a run may contain exports; the parents of the run do not matter
        if description:
            raise ValueError(
                f"{shown} is in {description}, {parent}: choose a folder outside of it"
            )


def _describe(folder: Path) -> str:
    """Return what a folder that belongs to a run, model or output is; "" = none of these."""
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


def _why_kept(folder: Path, kind: str, quick: bool) -> str:
    """Return why a folder that is not empty cannot be replaced, or "" if it can.

    Raises:
        OSError: the folder cannot be read.
    """
    old = sums.read(folder)
    if old and old.kind != kind:
        return f"holds {_with_article(old.kind)}, not {_with_article(kind)}"
    if not old and os.path.lexists(folder / ".git"):
        return "is a git checkout"
    if not old:
        names = [f"{path.name}{'/' if path.is_dir() else ''}" for path in _entries(folder)]
        return f"holds files that do not belong to {_with_article(kind)}: {_listed(names)}"
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
    """List a folder without unfinished jax_sft outputs."""
    return sorted(path for path in folder.iterdir() if not _is_unfinished(path))


def _stamps(folder: Path) -> frozenset[tuple[Any, ...]]:
    """Return (path, inode, size and ctime) of each file.

    Unlike mtime, ctime changes with the file and cannot be set by its owner.
    """
    stamps = []
    for root, folders, files in os.walk(folder):
        if root == str(folder):
            folders[:] = [name for name in folders if not _is_unfinished(folder / name)]
        for name in (*folders, *files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            stamps.append(
                (path, status.st_ino, not is_folder and (status.st_size, status.st_ctime_ns))
            )
    return frozenset(stamps)


# ---- an output while it is written ---------------------------------------------------------------


@contextlib.contextmanager
def unfinished(out: Path, say: Callable[[str], object] = print) -> Iterator[Path]:
    """Yield a new folder to write an output in, for `put_in_place`; it is removed at the end.

    Args:
        out: `Place.out`.
        say: called with a line about the leftovers of killed programs.

    Raises:
        OSError: a file operation failed.
    """
    remove_leftovers(out, say)
    staging = _staging_parent(out) / f"{_prefix(out)}{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        (staging / _OWNER).write_text(json.dumps(owner.this_process() | {"out": out.name}))
        (staging / _NEW).mkdir()
        yield staging / _NEW
    finally:
        _remove_staging(staging, out)


def put_in_place(new: Path, place: Place) -> None:
    """Rename a complete folder to its final name, replacing an unchanged older output.

    Args:
        new: the folder that `unfinished` yielded, with its SHA256SUMS.

    Raises:
        ValueError: since `check`, the older output was changed, or the name was taken.
        OSError: a file operation failed; the older output still has the name.
    """
    out, staging = place.out, new.parent
    is_inside = staging.parent == out
    if out.is_dir() and _entries(out):
        if not place.stamps:
            raise ValueError(f"{out} was written by another program meanwhile")
        if _stamps(out) != place.stamps and (problem := _why_kept(out, place.kind, quick=False)):
            raise ValueError(f"{out} {problem}. Choose another folder")
    if is_inside:
        _move_inside(new, out)
        return
    # A program killed between the two renames leaves the old output in its staging folder, from
    # which the next program's `remove_leftovers` puts it back.
    old = staging / _OLD
    if place.stamps and out.is_dir():
        os.rename(out, old)
    try:
        os.rename(new, out)  # also replaces an empty folder
    except OSError as error:
        if old.exists() and not out.exists():
            os.rename(old, out)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ValueError(f"{out} was written by another program meanwhile") from error
        raise
    sync(out.parent)


def _move_inside(new: Path, out: Path) -> None:
    """Move the files of an output into a folder that cannot be replaced by renaming.

    Such a folder is a mount point, or its parent is not writable.
    """
    old = new.parent / _OLD
    old.mkdir()
    names = sorted(new.iterdir(), key=lambda path: path.name == sums.NAME)  # SHA256SUMS last
    with contextlib.ExitStack() as undo:  # after any exception, also from a request to stop
        for path, target in [*((p, old) for p in _entries(out)), *((p, out) for p in names)]:
            os.rename(path, target / path.name)
            undo.callback(os.rename, target / path.name, path)
        undo.pop_all()
    sync(out)


def remove_leftovers(out: Path, say: Callable[[str], object] = print) -> None:
    """Remove the unfinished outputs that killed programs were writing to this path.

    Args:
        out: `Place.out`.
        say: called with a line about each.

    Raises:
        OSError: a file operation failed.
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
            return False  # `_move_inside` was killed: `old` and `out` both have a part
        _remove_listed(old)
    shutil.rmtree(staging / _NEW, ignore_errors=True)
    with contextlib.suppress(OSError):  # foreign files in it stay
        if os.listdir(staging) == [_OWNER]:
            (staging / _OWNER).unlink()
        staging.rmdir()
    return restored


def _remove_listed(folder: Path) -> None:
    """Remove the files that the SHA256SUMS of an old output lists; other files stay."""
    listing = sums.read(folder)
    folders = {folder}
    with contextlib.suppress(OSError):
        for path in listing.files if listing else ():
            (folder / path).unlink(missing_ok=True)
            folders |= {folder / parent for parent in Path(path).parents}
        (folder / sums.NAME).unlink(missing_ok=True)
        for path in sorted(folders, reverse=True):
            path.rmdir()


def _staging_parent(out: Path) -> Path:
    """Return a writable folder on the same file system, to write an unfinished output in."""
    if out.is_dir() and (_is_mount(out) or not os.access(out.parent, os.W_OK)):
        return out
    return out.parent


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder, which then cannot be renamed."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc
        return os.path.ismount(folder)
    # os.path.ismount misses bind mounts, which containers use: they are on the device of their
    # parent folder.
    return any(line.split()[4] == str(folder) for line in mounts.splitlines())


def _prefix(out: Path) -> str:
    """Return the prefix of the names of unfinished outputs of a path."""
    return f".{os.fsdecode(os.fsencode(out.name)[:_MOST_NAME_BYTES])}.jax_sft-"


def _is_unfinished(path: Path) -> bool:
    """Whether a folder is a staging folder that `unfinished` created."""
    is_named = re.fullmatch(r"\..*\.jax_sft-[0-9a-f]{8}", path.name, re.DOTALL)
    return bool(is_named) and not path.is_symlink() and os.path.isfile(path / _OWNER)


def _is_dead(staging: Path, out: Path) -> bool:
    """Whether the program that wrote an unfinished output has ended."""
    try:
        description = json.loads((staging / _OWNER).read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    if not isinstance(description, dict) or description.get("out") != out.name:
        return False
    running = owner.is_running(description)
    if running is None:  # on another host, or in another container
        files = (staging / _OWNER, *(staging / _NEW).rglob("*"))
        newest = max(path.lstat().st_mtime for path in files)
        return newest < time.time() - owner.DAY_S
    return not running
