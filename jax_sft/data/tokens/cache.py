"""Cache tokenized sources on disk, in a folder per source named by all that decides its tokens.

`prepare` and `row_report` ask for a source and get a `Store`. `worker` tokenizes sources that have
no store yet. The cache folder may be deleted at any time; `cache_room` removes old stores.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from jax_sft.data.chat import encoding
from jax_sft.data.sources import formats, read
from jax_sft.data.tokens import cache_room, file_hashes, store_lock, worker
from jax_sft.data.tokens.store import Damaged, Store, Writer, open_store, publish
from jax_sft.data.tokens.worker import VERSIONS
from jax_sft.files import cache_folder
from jax_sft.settings import Source

# Keys of a source that do not change its tokens; a moved file keeps its store.
NOT_IN_KEY = ("path", "epochs", "weight")
# Files next to a tokenizer that are not part of it: mostly weights, which take long to hash.
NOT_TOKENIZER = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".md", ".gitattributes"),
)
PLAIN = (".jsonl", ".json", ".ndjson")  # files whose chunks know their size in bytes


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `open_or_build`, with the source's files.

    Attributes:
        root: the folder that holds all files.
        cache: the cache folder.
    """

    source: Source
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
    source: Source,
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
        source: the source.
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
        with store_lock.lock(request.cache, key, request.name, store) as locked:
            store = _open(request, key)  # another process may have built it meanwhile
            if isinstance(store, Damaged | None):
                store_lock.make_room(request.cache, key, locked, store)
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
    source: Source,
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
    source: Source,
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
        "source": {
            k: v
            for k, v in sorted(dataclasses.asdict(request.source).items())
            if k not in NOT_IN_KEY
        },
        "options": dataclasses.asdict(request.options),
        "max_row_bytes": request.max_row_bytes,
        "tokenizer": [[str(file.relative_to(folder)), contents[file]] for file in tokenizer_files],
        "versions": VERSIONS,
    }
    # Not sorted: the order of keys within a template argument may affect the text.
    return hashlib.sha256(json.dumps(deciding, default=repr).encode()).hexdigest()


def _open(request: _Request, key: str) -> Store | Damaged | None:
    with store_lock.explained(request.cache):
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


# ---- building -----------------------------------------------------------------------------------


def _build(request: _Request, key: str) -> None:
    """Tokenize a source into its folder, which appears complete or not at all."""
    chunks = read.chunks(request.source, request.files, request.max_row_bytes)
    first = next(chunks, None)
    assert first is not None, "a file without rows is an error of `read`"
    format_name, reason = _choose(request, first)
    job = worker.Job(request.tokenizer_folder, request.options, request.source, format_name)
    folder = store_lock.unfinished(request.cache, key)
    try:
        with contextlib.ExitStack() as stack:
            with store_lock.explained(request.cache):
                folder.mkdir()
                writer = Writer(folder, request.root, stack)
            bar, size = _bar(request)
            stack.enter_context(bar)
            work = worker.tokenize(job, itertools.chain([first], chunks), request.num_workers)
            for chunk, result in stack.enter_context(contextlib.closing(work)):
                if request.stop_at_bad_row and result.refused:
                    bad = result.refused[0]
                    raise _bad_row(request, f"{chunk.file}, {bad.place}", bad.reason)
                with store_lock.explained(request.cache):
                    writer.add(chunk.file, result)
                bar.update(size(chunk))
            # The key was computed before the files were read: they may have changed in between.
            if _key(request, progress=False) != key:
                raise ValueError(
                    f"the files of {request.source.path} (source {request.name!r}), or those of "
                    f"the tokenizer {request.tokenizer_folder}, changed while they were read: "
                    "start again"
                )
            with store_lock.explained(request.cache):
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
