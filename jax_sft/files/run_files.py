"""Write the small files of a workdir: completely or not at all, and never through a link.

A failed write never ends the run. It is reported once, and the content is kept and written later.
"""

import json
import math
import os
import stat
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_WAITING = 10_000  # lines of metrics that are kept while the file cannot be written

Say = Callable[[str], object]


def replace(file: Path, content: bytes) -> None:
    """Write a file and rename it over an existing one; a link is replaced, not followed.

    Raises:
        OSError: a file operation failed; the existing file is unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(unfinished, "xb") as stream:  # fails for an existing file or link
            stream.write(content)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


class Record:
    """The files config.json and data_report.json of a run.

    Args:
        folder: the workdir.
        say: prints a line.
    """

    def __init__(self, folder: Path, say: Say):
        self._folder, self._say = folder, say
        self._files: dict[str, bytes] = {}
        self._failed: set[str] = set()

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a file as JSON now; if that fails, a later `mend` writes it."""
        self._files[name] = (json.dumps(values, indent=2) + "\n").encode()
        self._try(name)

    def mend(self) -> None:
        """Write the files again that could not be written or were removed."""
        gone = [n for n in self._files if not os.path.lexists(self._folder / n)]
        if removed := [name for name in gone if name not in self._failed]:
            self._say(
                f"WARNING {', '.join(removed)} in {self._folder} were removed: writing them again"
            )
        for name in {*gone, *self._failed}:
            self._try(name)

    def _try(self, name: str) -> None:
        try:
            replace(self._folder / name, self._files[name])
            self._failed.discard(name)
        except OSError as error:
            if name not in self._failed:
                self._say(
                    f"WARNING {self._folder / name} cannot be written ({error.strerror}): tried "
                    "again with each save"
                )
            self._failed.add(name)


class Jsonl:
    """The file metrics.jsonl: one JSON object per logged step, written before the next step.

    Opening it removes the lines of lost steps (past `start_step`) and moves damaged lines to
    FILE.damaged. Anything that is not a regular file is renamed to FILE.damaged.
    """

    def __init__(self, file: Path, start_step: int, say: Say = print):
        self._file, self._start, self._say = file, start_step, say
        self._opened = -1
        self._is_clean = self._is_troubled = False
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._written = 0  # bytes of the first waiting line that are written
        self._flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line before the next step."""
        # JSON has no NaN. The loss is NaN if no step since the last line was applied.
        finite = {key: v if math.isfinite(v) else None for key, v in metrics.items()}
        if len(self._waiting) == MOST_WAITING:
            self._written = 0
        self._waiting.append((json.dumps({"step": step, **finite}) + "\n").encode())
        self._flush()

    def close(self) -> None:
        """Write the waiting lines, and close the file."""
        self._flush()
        if self._waiting:
            self._say(f"WARNING {len(self._waiting)} lines of {self._file} could not be written")
        if self._opened >= 0:
            os.close(self._opened)
            self._opened = -1

    def _flush(self) -> None:
        try:
            self._prepare()
            while self._waiting:
                line = self._waiting[0]
                self._written += os.write(self._opened, line[self._written :])
                if self._written == len(line):
                    self._waiting.popleft()
                    self._written = 0
        except OSError as error:
            if not self._is_troubled:
                self._say(
                    f"WARNING {self._file} cannot be written ({error.strerror}): its lines are "
                    "kept, and tried again with the next one"
                )
            self._is_troubled = True
            return
        if self._is_troubled:
            self._say(f"metrics {self._file} is written again")
        self._is_troubled = False

    def _prepare(self) -> None:
        """Open the file; open it again if the open file was removed or replaced."""
        if not self._is_clean:
            _clean(self._file, self._start, self._say)
            self._is_clean = True
        if self._opened >= 0:
            opened = os.fstat(self._opened)
            try:
                current = os.lstat(self._file)
            except FileNotFoundError:
                current = None
            if current and (current.st_dev, current.st_ino) == (opened.st_dev, opened.st_ino):
                return
            self._say(f"WARNING {self._file} was removed or replaced: a new file begins here")
            os.close(self._opened)
            self._opened, self._written = -1, 0
        self._file.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self._opened = os.open(self._file, flags, 0o666)


def _clean(file: Path, start_step: int, say: Say) -> None:
    """Keep only the lines of steps up to `start_step`.

    Raises:
        OSError: the file cannot be read or written.
    """
    damaged_file = file.with_name(file.name + ".damaged")
    try:
        mode = os.lstat(file).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        aside = _free_name(damaged_file)
        os.rename(file, aside)
        say(f"WARNING {file} is not a file: it is now {aside.name}")
        return
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.strip()]
    steps = [_step_of(line) for line in lines]
    damaged = [line for line, step in zip(lines, steps, strict=True) if step is None]
    if damaged:
        aside = _free_name(damaged_file)
        replace(aside, b"".join(damaged))
        say(f"WARNING {file} had {len(damaged)} damaged line(s): they are now in {aside.name}")
    kept = [
        line.rstrip(b"\r\n") + b"\n"
        for line, step in zip(lines, steps, strict=True)
        if start_step and step is not None and step <= start_step
    ]
    if b"".join(kept) != file.read_bytes():
        replace(file, b"".join(kept))


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _step_of(line: bytes) -> float | None:
    """Return the step of a line; None if it has none, or is not complete JSON."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int | float) and not isinstance(step, bool) else None
