"""The folders of a checkpoint folder: which steps there are, and how one comes, goes or is kept.

A step counts when its folder is a plain number: it gets that name when it is complete. Only the
first process changes anything here.
"""

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jax_sft.files import manifest
from jax_sft.files.disk import sync
from jax_sft.runtime.text import at_most

INCOMPLETE = ".incomplete"
CORRUPT = ".corrupt"
DELETED = ".deleted"
KEPT = "model_files"  # what a checkpoint folder keeps of its model, see model_files
IN_RUN = "checkpoints"  # the checkpoint folder, in the folder of a run
T = TypeVar("T")
_TRIES = 5  # of reading the newest step of a run that goes on
LAST_OF_FORMAT_1 = "41753b1"
PARAMS = "params/"  # names of the arrays that are parameters begin with it
_STEP = re.compile(r"0|[1-9]\d*")
# Exactly the names that are given here, by Orbax and by `disk.probe_folder`: a copy that somebody
# keeps has another one.
_LEFTOVER = re.compile(
    r"\d+\.incomplete(-\d+)?|\d+\.deleted-[0-9a-f]+|\d+.*\.orbax-checkpoint-tmp.*"
    r"|\.model_files(-[0-9a-f]{8}|[a-z0-9_]{8})|\.[0-9a-f]+\.probe"
)
_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's, with what we add to it


def locate(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """Return the checkpoint folder that a path means, and the step that it names.

    Args:
        path: a run, its checkpoint folder, or a step in that. Any other path is returned as it is.
        step: another way to name one.

    Raises:
        ValueError: two different steps are named.
    """
    for each in (path, Path(os.path.realpath(path))):
        if _STEP.fullmatch(each.name) and (each.parent / KEPT).is_dir():
            named = int(each.name)
            if step not in (None, named):
                raise ValueError(f"{path} is step {named}, and --step={step} names another")
            return each.parent, named
    inner = path / IN_RUN
    is_run = not (path / KEPT).is_dir() and (inner / KEPT).is_dir()
    return (inner if is_run else path), step


def present(folder: Path) -> list[int]:
    """Return the steps that were completed, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if _STEP.fullmatch(p.name)), reverse=True)


def set_aside(folder: Path) -> list[str]:
    """Return the names of steps that an earlier start found to be damaged."""
    return sorted(p.name for p in folder.iterdir() if CORRUPT in p.name)


def is_leftover(name: str) -> bool:
    """Whether something was left by a save or a removal that did not end."""
    return bool(_LEFTOVER.fullmatch(name))


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves and removals left; return the names."""
    names = sorted(p.name for p in folder.iterdir() if is_leftover(p.name))
    for name in names:
        remove(folder / name)
    return names


def remove(path: Path) -> None:
    """Remove a file or a folder; a link itself, never what it points to."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def publish(incomplete: Path, step: int) -> Path:
    """Give a complete step its name, durably, in the place of an older one of the same step."""
    folder, final = incomplete.parent, incomplete.parent / str(step)
    if final.exists() or final.is_symlink():
        os.rename(final, folder / f"{step}{DELETED}-{uuid.uuid4().hex[:8]}")
    os.rename(incomplete, final)
    sync(folder)
    return final


def move_aside(folder: Path, step: int) -> Path:
    """Rename a damaged step, so that it is never loaded; return the new path."""
    aside = folder / f"{step}{CORRUPT}"
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder / f"{step}{CORRUPT}-{number}"
    os.rename(folder / str(step), aside)
    sync(folder)
    return aside


def remove_all(folder: Path, unwanted: Iterable[int]) -> None:
    """Remove steps, and what an earlier removal left: renamed first, so that none is half there."""
    for step in unwanted:
        os.rename(folder / str(step), folder / f"{step}{DELETED}-{uuid.uuid4().hex[:8]}")
    for path in filter(lambda path: is_leftover(path.name), folder.glob(f"*{DELETED}-*")):
        remove(path)


def check(
    folder: Path,
    step: int,
    hashes: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: str = "",
) -> manifest.Check:
    """Check the files of a step; the arguments are those of `manifest.check`."""
    found = manifest.check(folder / str(step), hashes, part, progress)
    if not found.problems and (named := metadata(folder / str(step)).get("step")) != step:
        problem = f"its metadata are of step {named}, not {step}"
        return dataclasses.replace(found, problems=(problem,))
    return found


def refuse_older_format(folder: Path) -> None:
    """Refuse steps of a format that is not read any more; they are not damaged.

    Raises:
        ValueError: the newest step is of one.
    """
    for step in present(folder)[:1]:
        version = metadata(folder / str(step)).get("format_version")
        if version == 1 and not (folder / str(step) / manifest.name(0)).exists():
            raise ValueError(
                f"{folder / str(step)} is a checkpoint of format 1, which was read until commit "
                f"{LAST_OF_FORMAT_1} of jax_sft: export it with that version "
                "(jax-sft export), and use the export as model.path, or choose another "
                "workdir"
            )


def choose(folder: Path, step: int | None = None) -> int:
    """Return a step that is there, by default the newest.

    Raises:
        ValueError: it is not.
    """
    found = present(folder)
    if not found or (step is not None and step not in found):
        raise ValueError(
            f"{folder} has no step {'' if step is None else step}: it has {found[::-1]}"
        )
    return found[0] if step is None else step


def newest_again(
    folder: Path,
    step: int | None,
    use: Callable[[int | None], T],
    say: Callable[[str], object] = print,
) -> T:
    """Return what `use` returns for a step; for the newest one where none is named.

    A run beside it may remove a step while it is read: then it is done again, a few times.

    Raises:
        ValueError, OSError: `use` raised it for a step that was named, or is still there.
    """
    for _ in range(_TRIES):
        newest = next(iter(present(folder)), None) if step is None else step
        try:
            return use(newest)
        except (ValueError, OSError):
            if step is not None or newest is None or (folder / str(newest)).exists():
                raise
            say(f"step {newest} was removed while it was read: taking the newest again")
    return use(step)


def params(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return {our path: {"shape", "dtype", "sum"}} of the parameters of a step.

    Raises:
        ValueError: its files are damaged.
    """
    found = check(folder, step)
    if found.problems:
        raise ValueError(damaged(folder, step, found.problems))
    assert found.manifest
    return {
        name.removeprefix(PARAMS): array
        for name, array in found.manifest.arrays.items()
        if name.startswith(PARAMS)
    }


def misfits(
    arrays: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, Sequence[int]],
    cut: Callable[[str, Sequence[int]], tuple[int, ...]] = lambda _, shape: tuple(shape),
) -> str:
    """Say which stored arrays are missing, too many or of another shape; "" = none.

    Args:
        cut: (name, stored shape) -> the shape that is compared.
    """
    problems = [f"{name} is not in it" for name in wanted.keys() - arrays.keys()]
    problems += [f"{name} is only in it" for name in arrays.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(arrays[name]['shape'])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in arrays and cut(name, arrays[name]["shape"]) != tuple(shape)
    ]
    return "; ".join(at_most(sorted(problems)))


def damaged(folder: Path, step: int, problems: Sequence[str]) -> str:
    """Say what is wrong with a step, and which others there are."""
    lines = "\n  ".join(at_most(problems))
    others = present(folder)[::-1]
    return f"{folder / str(step)} is damaged:\n  {lines}\nThe steps are {others}: choose --step"


def metadata(step_folder: Path) -> dict[str, Any]:
    """Return what we stored with a step; {} if it cannot be read."""
    try:
        found = json.loads((step_folder / _METADATA_FILE).read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
