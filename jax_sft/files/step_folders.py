"""List, publish, quarantine and delete the step folders of a checkpoint folder.

A step exists if its folder name is a plain number, which it gets when it is complete. Only the
first process of a run changes these folders.
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
KEPT = "model_files"  # folder of the stored model files, see model_files
IN_RUN = "checkpoints"  # the checkpoint folder in the folder of a run
T = TypeVar("T")
_TRIES = 5  # attempts to read the newest step of a run that is still training
LAST_OF_FORMAT_1 = "41753b1"
PARAMS = "params/"  # prefix of the names of arrays that are parameters
_STEP = re.compile(r"0|[1-9]\d*")
# Matches only names from this module, `model_files`, Orbax and `disk.probe_folder`, so that a copy
# that a user keeps under another name is never removed.
_LEFTOVER = re.compile(
    r"\d+\.incomplete(-\d+)?|\d+\.deleted-[0-9a-f]+|\d+.*\.orbax-checkpoint-tmp.*"
    r"|\.model_files(-[0-9a-f]{8}|[a-z0-9_]{8})|\.[0-9a-f]+\.probe"
)
_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's file, which includes our metadata


def locate(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """Return the checkpoint folder of a path, and the step that path or `step` names.

    Args:
        path: a run, its checkpoint folder, or a step folder. Any other path is returned as it is.
        step: the step, if the path does not name it.

    Raises:
        ValueError: path and `step` name different steps.
    """
    for candidate in (path, Path(os.path.realpath(path))):
        if _STEP.fullmatch(candidate.name) and (candidate.parent / KEPT).is_dir():
            path_step = int(candidate.name)
            if step not in (None, path_step):
                raise ValueError(f"{path} is step {path_step}, and --step={step} names another")
            return candidate.parent, path_step
    inner = path / IN_RUN
    is_run = not (path / KEPT).is_dir() and (inner / KEPT).is_dir()
    return (inner if is_run else path), step


def present(folder: Path) -> list[int]:
    """Return the complete steps, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if _STEP.fullmatch(p.name)), reverse=True)


def set_aside(folder: Path) -> list[str]:
    """Return the folder names of the damaged steps that were moved aside."""
    return sorted(p.name for p in folder.iterdir() if CORRUPT in p.name)


def is_leftover(name: str) -> bool:
    """Whether a name is that of a leftover of an unfinished save or removal."""
    return bool(_LEFTOVER.fullmatch(name))


def remove_leftovers(folder: Path) -> list[str]:
    """Remove leftovers of killed saves and removals; return their names."""
    names = sorted(p.name for p in folder.iterdir() if is_leftover(p.name))
    for name in names:
        remove(folder / name)
    return names


def remove(path: Path) -> None:
    """Remove a file or a folder; of a link, remove only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def publish(incomplete: Path, step: int) -> Path:
    """Rename a complete step to its number, durably, replacing an older save of that step."""
    folder, final = incomplete.parent, incomplete.parent / str(step)
    if final.exists() or final.is_symlink():
        os.rename(final, folder / f"{step}{DELETED}-{uuid.uuid4().hex[:8]}")
    os.rename(incomplete, final)
    sync(folder)
    return final


def move_aside(folder: Path, step: int) -> Path:
    """Rename a damaged step so that it is never loaded; return the new path."""
    aside = folder / f"{step}{CORRUPT}"
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder / f"{step}{CORRUPT}-{number}"
    os.rename(folder / str(step), aside)
    sync(folder)
    return aside


def remove_all(folder: Path, unwanted: Iterable[int]) -> None:
    """Remove steps, and leftovers of earlier removals.

    A step is renamed before its files are removed, so that no incomplete step is ever listed.
    """
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
    """Check the files of a step; see `manifest.check` for the arguments."""
    result = manifest.check(folder / str(step), hashes, part, progress)
    if not result.problems and (stored_step := metadata(folder / str(step)).get("step")) != step:
        problem = f"its metadata are of step {stored_step}, not {step}"
        return dataclasses.replace(result, problems=(problem,))
    return result


def refuse_older_format(folder: Path) -> None:
    """Refuse a checkpoint folder in the old format 1, with advice instead of a damage report.

    Raises:
        ValueError: the newest step has format 1.
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
    """Return `step`, or the newest step if None.

    Raises:
        ValueError: the step does not exist.
    """
    steps = present(folder)
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{folder} has no step {'' if step is None else step}: it has {steps[::-1]}"
        )
    return steps[0] if step is None else step


def newest_again(
    folder: Path,
    step: int | None,
    use: Callable[[int | None], T],
    say: Callable[[str], object] = print,
) -> T:
    """Return `use(step)`; if `step` is None, use the newest step.

    A training run may remove the newest step while it is read. Then `use` is called again with the
    step that is now the newest, a few times.

    Raises:
        ValueError, OSError: `use` raised it for a named step, or for a step that still exists.
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
    """Return {parameter path: {"shape", "dtype", "sum"}} of a step.

    Raises:
        ValueError: files of the step are damaged.
    """
    result = check(folder, step)
    if result.problems:
        raise ValueError(damaged(folder, step, result.problems))
    assert result.manifest
    return {
        name.removeprefix(PARAMS): array
        for name, array in result.manifest.arrays.items()
        if name.startswith(PARAMS)
    }


def misfits(
    arrays: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, Sequence[int]],
    cut: Callable[[str, Sequence[int]], tuple[int, ...]] = lambda _, shape: tuple(shape),
) -> str:
    """Return which stored arrays are missing, unexpected or of another shape, or "".

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
    """Return a message about a damaged step and the other steps."""
    lines = "\n  ".join(at_most(problems))
    others = present(folder)[::-1]
    return f"{folder / str(step)} is damaged:\n  {lines}\nThe steps are {others}: choose --step"


def metadata(step_folder: Path) -> dict[str, Any]:
    """Return the metadata that was stored with a step; {} if it cannot be read."""
    try:
        content = json.loads((step_folder / _METADATA_FILE).read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}
