"""Allow one run per workdir at a time: `run.lock` names its holder and shows that it is alive.

Process 0 of a run takes the lock and refreshes it. The lock is stale if its process is gone from
this machine. If that cannot be seen (another host or container), it is stale if it was not
refreshed while a newcomer watched. No clocks are compared, and no file system locks are needed.
"""

import dataclasses
import hashlib
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from jax_sft.files import owner

NAME = "run.lock"
BEAT_S = 5.0
WATCH_S = 30.0  # a holder that does not refresh the lock for this long has lost it
# Time for a live holder to end by itself. GRACE_S is for a holder whose launcher was killed.
# RESTART_S applies if the launcher has restarted this run: the holder may be the previous attempt,
# on another host that was cut off.
GRACE_S, RESTART_S = 2.0, 120.0
_MOST_S = 300.0  # limit of a newcomer's wait while others take over from each other
_SIZE = 4096  # bytes of a lock file that are read at most


_held: list["RunLock"] = []  # locks that this process holds


class Refused(ValueError):
    """Another run holds the lock of the workdir."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        started: start time of the process in ticks since boot; distinguishes reused process ids.
        machine: id of the boot and of the namespace of process ids; "" = not known.
        time: when the lock was taken, for people to read.
        token: unique id of this lock.
    """

    host: str
    pid: int
    started: str
    machine: str
    time: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.time}"


class RunLock:
    """The lock of a workdir; a context manager that takes and releases it.

    Args:
        folder: the workdir, which must exist.
        say: prints a line.

    Raises:
        Refused: on entering, if another run holds the lock.
        OSError: on entering, if the lock cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], object] = print):
        self._folder, self._path, self._say = folder, folder / NAME, say
        self._me = _this_process()
        self._beats = 0
        self._lost = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        self._take()
        _held.append(self)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock if this run still holds it."""
        self._closing.set()
        if self in _held:
            _held.remove(self)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=BEAT_S)
        try:
            if self._is_mine(_read(self._path)):
                self._path.unlink(missing_ok=True)
        except (OSError, Refused) as error:
            self._say(f"WARNING {self._path} could not be removed: {error}")

    def check(self, look: bool = False) -> None:
        """Refuse to continue if another run took over while this process was suspended.

        Args:
            look: read the lock now; otherwise use the result of the last refresh, up to BEAT_S old.

        Raises:
            Refused: another run has taken over.
        """
        if look:
            self._beat()
        if self._lost:
            raise Refused(self._lost)

    # ---- taking it -----------------------------------------------------------------------------

    def _take(self) -> None:
        began = time.monotonic()
        patience_s = RESTART_S if _is_restart() else GRACE_S
        while (waited_s := time.monotonic() - began) < _MOST_S:
            if self._create():
                return
            seen = _read(self._path)
            if seen is None:
                continue  # released just now
            holder = _parse(seen)
            alive = _is_alive(holder) if holder else None
            if alive is None and self._is_refreshed(seen, holder):
                alive = holder is not None and _parse(_read(self._path) or b"") == holder
                if not alive:
                    continue  # another newcomer has it now, or had not finished writing
            if alive and waited_s < patience_s:
                time.sleep(0.1)
            elif alive:
                raise Refused(
                    f"{self._folder} is in use by {holder} ({NAME} there), and allows one run at a "
                    "time: wait for that run to end, stop it, or choose another workdir. (In a "
                    f"copy of its workdir, remove {NAME}.)"
                )
            elif self._take_over(seen):
                why = f"silent for {WATCH_S:.0f} s" if alive is None else "that process is gone"
                self._say(f"lock    {self._path} of {holder or 'nobody'} is stale ({why}): taken")
                return
        raise Refused(f"{self._path} keeps changing: other runs are starting in that folder")

    def _create(self) -> bool:
        """Create the lock file; return whether this process created it."""
        try:
            _write_new(self._path, self._text())
        except FileExistsError:
            return False
        return True

    def _is_refreshed(self, seen: bytes, holder: Holder | None) -> bool:
        """Watch the lock; return whether it changed."""
        began, pause = time.monotonic(), 0.05
        is_announced = False
        while (waited := time.monotonic() - began) < WATCH_S:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            if _read(self._path) != seen:
                return True
            if waited > 0.5 and not is_announced:
                who = f"of {holder} " if holder else ""
                self._say(
                    f"lock    {self._path} {who}exists: watching for {WATCH_S:.0f} s whether it "
                    "is refreshed"
                )
                is_announced = True
        return False

    def _take_over(self, seen: bytes) -> bool:
        """Replace a stale lock; return whether this process did. Only one newcomer succeeds.

        1. Create a claim file, whose name is a hash of the stale lock. Only one newcomer can.
        2. Read the lock again, as another newcomer may have replaced it before step 1.
        3. Replace the lock by renaming.
        """
        claim = self._path.with_name(f"{NAME}.{hashlib.sha256(seen).hexdigest()[:16]}")
        try:
            _write_new(claim, self._text())
        except FileExistsError:
            self._wait_for(claim)
            return False
        try:
            if _read(self._path) != seen:
                return False
            unfinished = self._path.with_name(f"{NAME}.{self._me.token}")
            _write_new(unfinished, self._text())
            os.replace(unfinished, self._path)
        finally:
            claim.unlink(missing_ok=True)
        for left in self._folder.glob(f"{NAME}.*"):  # left by killed newcomers
            left.unlink(missing_ok=True)
        return self._is_mine(_read(self._path))

    def _wait_for(self, claim: Path) -> None:
        """Wait for another newcomer to take over; remove its claim if it is gone or too slow."""
        claimed = _read(claim)
        other = _parse(claimed or b"")
        began = time.monotonic()
        while claimed and _read(claim) == claimed:
            is_gone = other and _is_alive(other) is False
            if is_gone or time.monotonic() - began > WATCH_S:
                claim.unlink(missing_ok=True)
            time.sleep(0.05)

    # ---- keeping it ----------------------------------------------------------------------------

    def _refresh(self) -> None:
        while not self._closing.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        """Refresh the lock, or note that another run has taken it over.

        File errors are ignored: the next refresh may succeed, and only newcomers need to see it.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:  # removed, perhaps with the whole workdir
            self._restore()
            return
        except OSError:
            return
        try:
            content = os.read(descriptor, _SIZE)
            if self._is_mine(content):
                self._beats += 1
                os.pwrite(descriptor, self._text(), 0)
            elif other := _parse(content):
                self._lost = (
                    f"{self._folder} was taken over by {other}, while this run was suspended or "
                    "could not be seen: it stops, and writes nothing more"
                )
        except OSError:
            return
        finally:
            os.close(descriptor)

    def _restore(self) -> None:
        if self._closing.is_set():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._create()
        except OSError:
            return

    def _text(self) -> bytes:
        """Return the content of the lock. Its length is constant, so that it can be overwritten."""
        return f"{json.dumps(dataclasses.asdict(self._me))}\n{self._beats:020}\n".encode()

    def _is_mine(self, content: bytes | None) -> bool:
        holder = _parse(content or b"")
        return holder is not None and holder.token == self._me.token


def end_process(code: int) -> None:
    """End this process at once like os._exit, but release its locks first."""
    for lock in [*_held]:
        lock.release()
    os._exit(code)


def _write_new(path: Path, text: bytes) -> None:
    """Write a new file durably.

    Raises:
        FileExistsError: the file exists.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o644)
    try:
        os.write(descriptor, text)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes | None:
    """Return the content of a lock file; None if there is no file.

    Raises:
        Refused: the file is not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:  # a link, or a file of another user
        raise Refused(f"{path} cannot be read ({error.strerror}): remove it") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refused(f"{path} is not a file: remove it, or choose another workdir")
        return os.read(descriptor, _SIZE)
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> Holder | None:
    """Return the holder that a lock names; None if the content is invalid."""
    try:
        fields = json.loads(content.partition(b"\n")[0])
        names = {field.name: field.type for field in dataclasses.fields(Holder)}
        is_good = fields.keys() == names.keys() and all(
            type(fields[name]) is kind for name, kind in names.items()
        )
        return Holder(**fields) if is_good else None
    except (ValueError, AttributeError, RecursionError):
        return None


# ---- processes -----------------------------------------------------------------------------------


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=owner.started(os.getpid()) or "",
        machine=owner.machine(),
        time=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=uuid.uuid4().hex,
    )


def _is_alive(holder: Holder) -> bool | None:
    """Whether the process of a lock is alive; None = not visible from this process."""
    if not holder.machine or holder.machine != owner.machine() or not 0 < holder.pid < 1 << 31:
        return None
    return owner.runs(holder.pid, holder.started)


def _is_restart() -> bool:
    """Whether the launcher has restarted this run."""
    return os.environ.get("JAX_SFT_ATTEMPT", "0") not in ("", "0")
