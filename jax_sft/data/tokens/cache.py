"""Cache tokenized sources on disk, in a folder per source named by all that decides its tokens.

`prepare` and `row_report` ask for a source and get a `Store`. `worker` tokenizes sources that have
no store yet. The cache folder may be deleted at any time; `cache_room` removes old stores.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jax_sft.data.chat import encoding
from jax_sft.data.sources import formats, read
from jax_sft.data.tokens import cache_room, file_hashes, worker
from jax_sft.data.tokens.store import Damaged, Store, Writer, open_store, publish
from jax_sft.data.tokens.worker import VERSIONS
from jax_sft.files import cache_folder

# Keys of a source that do not change its tokens; a moved file keeps its store.
NOT_IN_KEY = ("path", "epochs", "weight")
# Files next to a tokenizer that are not part of it: mostly weights, which take long to hash.
NOT_TOKENIZER = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".md", ".gitattributes"),
)
PLAIN = (".jsonl", ".json", ".ndjson")  # files whose chunks know their size in bytes
HUNG_S = 900  # a build that has written nothing for this long hangs
SAY_AGAIN_S = 60
LEFTOVER_S = 24 * 3600  # a build that has written nothing for this long is dead


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `open_or_build`, with the source's files.

    Attributes:
        root: the folder that holds all files.
        cache: the cache folder.
    """

    source: Any
    name: str
    files: Sequence[Path]
    root: Path
    tokenizer_folder: Path
    options: encoding.Options
    cache: Path
    num_workers: int
    stop_at_bad_row: bool
    progress: bool
    max_row_bytes: int


def open_or_build(
    source,
    tokenizer_folder: str | os.PathLike,
    options: encoding.Options,
    cache_dir: str | os.PathLike,
    num_workers: int,
    *,
    stop_at_bad_row: bool,
    progress: bool,
    name: str = "",
    max_row_bytes: int = read.MAX_ROW_BYTES,
    cache_gb: float = 0,
) -> Store:
    """Return the tokens of a source, from the cache or tokenized now.

    Args:
        source: from `config.source`.
        tokenizer_folder: a local folder.
        cache_dir: `data.cache_dir`; "" = `cache_folder.default()`.
        num_workers: processes; 0 = one per core.
        stop_at_bad_row: raise at the first row that cannot be used; otherwise leave such rows out
            and list them in `Store.errors`.
        progress: show a bar.
        name: of the source in messages; "" = its path.
        max_row_bytes: see `read.chunks`.
        cache_gb: after a build, remove other stores until all together are no larger; 0 = keep all.

    Raises:
        ValueError: nothing to read, a bad row under `stop_at_bad_row`, a tokenizer that cannot be
            used, or a cache folder that cannot be written.
        RuntimeError: a process that tokenizes died.
    """
    request = _request(
        source,
        tokenizer_folder,
        options,
        cache_dir,
        num_workers,
        stop_at_bad_row=stop_at_bad_row,
        progress=progress,
        name=name,
        max_row_bytes=max_row_bytes,
    )
    key = _key(request, progress)
    store = _open(request, key)
    if isinstance(store, Damaged | None):
        with _lock(request, key, store) as locked:
            store = _open(request, key)  # another process may have built it meanwhile
            if isinstance(store, Damaged | None):
                _make_room(request.cache, key, locked, store)
                _build(request, key)
                store = _built(request, key)
                if cache_gb:
                    for old in cache_room.make_room(request.cache, cache_gb * 1e9, store.folder):
                        names = ", ".join(old.names[:3])
                        print(f"removed cached tokens of {names} (data.cache_gb)", file=sys.stderr)
    cache_room.touch(store.folder)
    if stop_at_bad_row:
        for error in store.errors():
            raise _bad_row(request, error["where"], error["error"])
    return store


def is_built(
    source,
    tokenizer_folder: str | os.PathLike,
    options: encoding.Options,
    cache_dir: str | os.PathLike,
    *,
    progress: bool,
    max_row_bytes: int = read.MAX_ROW_BYTES,
) -> bool:
    """Whether the tokens of a source seem to be in the cache; False if that is unknown."""
    with contextlib.suppress(ValueError, OSError):
        request = _request(
            source,
            tokenizer_folder,
            options,
            cache_dir,
            1,
            stop_at_bad_row=False,
            progress=progress,
            name="",
            max_row_bytes=max_row_bytes,
        )
        return (request.cache / _key(request, progress)).is_dir()
    return False


def _request(
    source,
    tokenizer_folder: str | os.PathLike,
    options: encoding.Options,
    cache_dir: str | os.PathLike,
    num_workers: int,
    *,
    stop_at_bad_row: bool,
    progress: bool,
    name: str,
    max_row_bytes: int,
) -> _Request:
    files = read.files(source)
    return _Request(
        source=source,
        name=name or str(source.path),
        files=files,
        root=Path(os.path.commonpath([file.parent for file in files])),
        tokenizer_folder=Path(tokenizer_folder),
        options=options,
        cache=cache_folder.of(cache_dir),
        num_workers=num_workers or worker.cores(),
        stop_at_bad_row=stop_at_bad_row,
        progress=progress,
        max_row_bytes=max_row_bytes,
    )


def _bad_row(request: _Request, where: str, reason: str) -> ValueError:
    return ValueError(
        f"{where} (source {request.name!r}): {reason}\n"
        'mend the row, or leave out and count what cannot be used: data.on_bad_row = "skip"'
    )


# ---- the key ------------------------------------------------------------------------------------


def _key(request: _Request, progress: bool) -> str:
    """Return a hash of all that changes the tokens of a source or their order (sha256, in hex)."""
    folder = request.tokenizer_folder
    tokenizer_files = sorted(
        file
        for pattern in ("*", "additional_chat_templates/*")
        for file in folder.glob(pattern)
        if file.is_file() and not file.name.endswith(NOT_TOKENIZER)
    )
    contents = file_hashes.contents([*request.files, *tokenizer_files], request.cache, progress)
    deciding = {
        "files": [[os.path.relpath(file, request.root), contents[file]] for file in request.files],
        "source": {k: v for k, v in request.source.to_dict().items() if k not in NOT_IN_KEY},
        "options": dataclasses.asdict(request.options),
        "max_row_bytes": request.max_row_bytes,
        "tokenizer": [[str(file.relative_to(folder)), contents[file]] for file in tokenizer_files],
        "versions": VERSIONS,
    }
    # Not sorted: the order of keys within a template argument may affect the text.
    return hashlib.sha256(json.dumps(deciding, default=repr).encode()).hexdigest()


def _open(request: _Request, key: str) -> Store | Damaged | None:
    with _explained(request.cache):
        try:
            return open_store(request.cache / key, request.root, progress=request.progress)
        except Damaged as error:
            return error


def _built(request: _Request, key: str) -> Store:
    """Open a store that was built just now."""
    store = _open(request, key)
    if isinstance(store, Damaged | None):
        raise ValueError(
            f"{request.cache / key} was made just now and cannot be used: "
            f"{store or 'another program has removed it'}: check the disk, or set data.cache_dir "
            "to a folder on another"
        )
    return dataclasses.replace(store, cached=False)


# ---- locks and leftovers ------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(cache: Path, damage: Damaged | None = None) -> Iterator[None]:
    """Add a remedy to errors of the operating system about the cache folder.

    Args:
        damage: of the store that has to be built again.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room, or set data.cache_dir to a folder on a larger disk"
        else:
            remedy = "set data.cache_dir to a folder that can be written"
        why = f" (the store in it is damaged: {damage})" if damage else ""
        raise ValueError(
            f"the cache folder {cache} cannot be used: {error}{why}: {remedy}"
        ) from error


@contextlib.contextmanager
def _lock(request: _Request, key: str, damage: Damaged | None) -> Iterator[bool]:
    """Let one process at a time build a store; the lock ends with the process that holds it.

    Yields whether there is a lock, since not every file system has them. Without one, the rename at
    the end of a build still keeps the store intact.
    """
    with _explained(request.cache, damage):
        request.cache.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: opening a FIFO in place of the file would block forever.
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        stream = open(os.open(request.cache / f"{key}.lock", flags, 0o666), "r+b", buffering=0)
    with stream:
        locked = _try_lock(stream)
        if locked is False:
            _wait(request, key, stream)
        if locked is not None:
            _sign(stream)
        yield locked is not None


def _sign(stream) -> None:
    """Write the holder of a lock into its file, for the processes that wait."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk
        stream.seek(0)  # `_wait` has moved the position by reading
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())


def _wait(request: _Request, key: str, stream) -> None:
    """Wait for another process to build a store, and name it every SAY_AGAIN_S.

    Raises:
        ValueError: it has written nothing for HUNG_S.
    """
    said, size, grown = -math.inf, -1, time.monotonic()
    while _try_lock(stream) is False:
        now, before = time.monotonic(), size
        size = sum(_size(file) for file in request.cache.glob(f"{key}.unfinished-*/*"))
        if size != before:
            grown = now
        stream.seek(0)
        holder = stream.read(200).decode("utf-8", "replace") or "unknown"
        if now - grown > HUNG_S:
            raise ValueError(
                f"source {request.name!r}: another process ({holder}) tokenizes it, and has "
                f"written nothing for {HUNG_S / 60:.0f} minutes: end that process, or set "
                "data.cache_dir to another folder"
            )
        if now - said > SAY_AGAIN_S:
            said = now
            print(
                f"source {request.name!r}: waiting for another process that tokenizes it "
                f"({holder}; {size / 1e6:,.1f} MB written)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.1)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it has been renamed or removed
        return 0


def _try_lock(stream) -> bool | None:
    """Lock a file without waiting; return whether that succeeded, None if there are no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unfinished(cache: Path, key: str) -> Path:
    """Return a new folder for a build, whose process is identified by the lock of the key."""
    return cache / f"{key}.unfinished-{socket.gethostname()}-{secrets.token_hex(4)}"


def _make_room(cache: Path, key: str, locked: bool, damage: Damaged | None) -> None:
    """Remove a damaged store, and the leftovers of killed builds."""
    with _explained(cache, damage):
        if damage:
            print(f"{cache / key} is damaged ({damage}): tokenizing again", file=sys.stderr)
            (cache / key).rename(damaged := _unfinished(cache, key))
            _remove(damaged)
        for folder in cache.glob("*.unfinished-*"):
            with contextlib.suppress(OSError):  # another user's, or removed by another process
                if _is_dead(folder, key if locked else ""):
                    shutil.rmtree(folder)


def _remove(store: Path) -> None:
    """Remove a store, or the file or link in its place."""
    if store.is_dir() and not store.is_symlink():
        shutil.rmtree(store)
    else:
        store.unlink()


def _is_dead(folder: Path, locked_key: str) -> bool:
    """Whether the process that made an unfinished folder has ended.

    That process held the lock of its key. Locks may not reach other machines that share the cache
    folder; their builds are considered dead when they have written nothing for a day.
    """
    key, _, rest = folder.name.partition(".unfinished-")
    if rest.startswith(socket.gethostname() + "-"):
        if key == locked_key:
            return True
        with open(folder.parent / f"{key}.lock", "ab") as stream:
            if (free := _try_lock(stream)) is not None:
                return free
    written = [file.stat().st_mtime for file in (folder, *folder.glob("*"))]
    return time.time() - max(written) > LEFTOVER_S


# ---- building -----------------------------------------------------------------------------------


def _build(request: _Request, key: str) -> None:
    """Tokenize a source into its folder, which appears complete or not at all."""
    chunks = read.chunks(request.source, request.files, request.max_row_bytes)
    first = next(chunks, None)
    assert first is not None, "a file without rows is an error of `read`"
    format_name, reason = _choose(request, first)
    job = worker.Job(request.tokenizer_folder, request.options, request.source, format_name)
    folder = _unfinished(request.cache, key)
    try:
        with contextlib.ExitStack() as stack:
            with _explained(request.cache):
                folder.mkdir()
                writer = Writer(folder, request.root, stack)
            bar, size = _bar(request)
            stack.enter_context(bar)
            work = worker.tokenize(job, itertools.chain([first], chunks), request.num_workers)
            for chunk, result in stack.enter_context(contextlib.closing(work)):
                if request.stop_at_bad_row and result.refused:
                    bad = result.refused[0]
                    raise _bad_row(request, f"{chunk.file}, {bad.place}", bad.reason)
                with _explained(request.cache):
                    writer.add(chunk.file, result)
                bar.update(size(chunk))
            # The key was computed before the files were read: they may have changed in between.
            if _key(request, progress=False) != key:
                raise ValueError(
                    f"the files of {request.source.path} (source {request.name!r}), or those of "
                    f"the tokenizer {request.tokenizer_folder}, changed while they were read: "
                    "start again"
                )
            with _explained(request.cache):
                writer.finish(key=key, format=format_name, format_reason=reason)
                publish(folder, request.cache / key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _choose(request: _Request, chunk: read.Chunk) -> tuple[str, str]:
    records = list(read.parse(chunk))
    rows = [record.row for record in records if record.row is not None]
    if not rows:
        raise ValueError(
            f"{records[0].where} (source {request.name!r}): {records[0].error}; nor can any other "
            f"of the first {len(records)} rows be read"
        )
    return formats.choose(request.source, rows)


def _bar(request: _Request) -> tuple[tqdm, Callable[[read.Chunk], int]]:
    """Return a progress bar, and a function that returns how far a chunk advances it.

    It counts bytes where the files are plain text, so that it can estimate the remaining time, and
    rows otherwise.
    """
    limit = request.source.limit
    plain = not limit and all(file.suffix.lower() in PLAIN for file in request.files)
    total = sum(file.stat().st_size for file in request.files) if plain else limit or None
    bar = tqdm(
        desc=f"tokenizing {request.name}",
        total=total,
        unit="B" if plain else "row",
        unit_scale=plain,
        disable=not request.progress,
    )
    return bar, (lambda chunk: sum(map(len, chunk.payload)) + len(chunk.payload)) if plain else len
