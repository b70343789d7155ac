"""Hugging Face folders: check one, stream its weights to their shards, write one back.

Reads and writes safetensors only. The weight rows of a family (`models.spec`) say what every tensor
is called, what shape it has and how it is laid out; nothing here knows a family.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jax_sft import parallel
from jax_sft.models.spec import Weight

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# What belongs to a model folder beside its weights, carried over unchanged.
SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)

_PICKLES = ("bin", "pt", "pth", "pkl", "ckpt")
# Buffers that old exports contain and the architecture computes.
_COMPUTED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def resolve(path: str, revision: str = "", weights: bool = True) -> Path:
    """Return the local folder of a model: `path` itself, or a download of the hub id `path`.

    Args:
        weights: download the weights too, not only config and tokenizer.

    Raises:
        ValueError: neither a folder nor a hub id that can be had; or a file of the folder is a
            link out of it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        _refuse_links(folder)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(f"model.path = {path!r} is not a folder")
    patterns = [*SIDE_FILES]
    if weights:
        patterns += ["*.safetensors", "model.safetensors.index.json"]
    try:
        found = huggingface_hub.snapshot_download(
            path, revision=revision or None, allow_patterns=patterns
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path = {path!r} is neither a folder here nor a model the hub gave: {error}"
        ) from error
    return Path(found)


def _refuse_links(folder: Path) -> None:
    """Refuse links to files elsewhere: they would be read, and copied into every export.

    Raises:
        ValueError: naming each.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: its files are links into ../../blobs
        home = home.parent.parent
    problems = [
        f"{file.relative_to(folder)} -> {file.resolve()}"
        for pattern in ("*", "additional_chat_templates/*")
        for file in sorted(folder.glob(pattern))
        if file.is_symlink() and not file.resolve().is_relative_to(home)
    ]
    if problems:
        raise ValueError(
            f"{folder} has links out of the folder: {', '.join(problems)}. Put the files "
            "themselves there, or set model.path to the folder that has them"
        )


def pickles(folder: Path) -> list[str]:
    """Name the pickle files of a model folder; they could run code, and are never read."""
    return sorted(file.name for kind in _PICKLES for file in folder.glob(f"*.{kind}"))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        ValueError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}: it is not a model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor of a folder is."""

    file: Path
    dtype: str  # safetensors' name, a key of DTYPES
    shape: tuple[int, ...]


def _weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder, from its index if it has one."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists() and not single.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, a path out of the folder")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{index} names files that are not there: {missing}")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if found := pickles(folder):
        raise ValueError(
            f"{folder} holds weights only as pickle files {found}, which can run code "
            "when read: convert them with transformers' save_pretrained(safe_serialization=True)"
        )
    raise ValueError(f"{folder} has no *.safetensors file")


def read_headers(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the headers of all weight files. Returns ({HF name: Tensor}, problems)."""
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    if name in tensors:
                        problems.append(f"{name} is in {tensors[name].file.name} and {file.name}")
                    tensors[name] = Tensor(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} cannot be read: {error}")
    return tensors, problems


def check(
    folder: Path, rows: Iterable[Weight], dims: dict[str, int], tied: bool
) -> dict[str, Tensor]:
    """Check a folder's tensors against the weight rows, reading only headers.

    Returns:
        {HF name: Tensor} of exactly the tensors of the rows.

    Raises:
        ValueError: every unknown, missing, duplicate, misshapen or non-floating tensor at once,
            with file, name and both shapes.
    """
    found, problems = read_headers(folder)
    wanted = {name: row.hf_shape(dims) for row in rows for _, name in row.hf_tensors(dims)}
    for name, tensor in found.items():
        where = f"{tensor.file.name}: {name}"
        if name not in wanted:
            if tied and name == "lm_head.weight":
                problems += _tied_copy_problems(found)
            elif not _COMPUTED.match(name):
                problems.append(f"{where} {tensor.shape} is not part of this architecture")
        elif tensor.shape != wanted[name]:
            problems.append(f"{where} has shape {tensor.shape}, config.json needs {wanted[name]}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{where} has dtype {tensor.dtype}, which is not one of {[*DTYPES]}")
    for name in sorted(wanted.keys() - found.keys()):
        hint = " (set tie_word_embeddings in config.json if it is tied)"
        problems.append(
            f"{name} {wanted[name]} is missing{hint if name == 'lm_head.weight' else ''}"
        )
    if problems:
        shown = problems[:50] + [f"... and {len(problems) - 50} more"] * (len(problems) > 50)
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(shown))
    return {name: found[name] for name in wanted}


def _tied_copy_problems(found: dict[str, Tensor]) -> list[str]:
    """A tied model may store its head too, but only as an exact copy of the embedding."""
    head, embedding = found["lm_head.weight"], found.get("model.embed_tokens.weight")
    if embedding is None:
        return []  # reported as missing
    with safe_open(head.file, "numpy") as a, safe_open(embedding.file, "numpy") as b:
        same = head.shape == embedding.shape and np.array_equal(
            a.get_tensor("lm_head.weight"), b.get_tensor("model.embed_tokens.weight")
        )
    if same:
        return []
    return [
        f"{head.file.name}: lm_head.weight differs from the embedding, yet config.json says "
        "tie_word_embeddings = true: set it to false, or remove the tensor"
    ]


def load(
    tensors: Mapping[str, Tensor],
    rows: Iterable[Weight],
    dims: dict[str, int],
    shardings: Mapping[str, NamedSharding],
    dtype: Any,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Read every weight straight into its shards.

    Each process reads only the blocks its devices hold, one HF tensor at a time: host memory
    peaks at this process's shards of one parameter.

    Args:
        tensors: as returned by `check`.
        shardings: {our path: sharding}.
        dtype: of the returned arrays.

    Returns:
        {our path: array}.
    """
    rows = list(rows)
    opened = {
        file: safe_open(file, framework="numpy") for file in {t.file for t in tensors.values()}
    }
    params = {}
    total = sum(1 for row in rows for _ in row.hf_tensors(dims))
    bar = tqdm(total=total, desc="reading weights", unit="tensor", disable=not progress)
    with bar:
        for row in rows:
            num_stacked = len(row.stacked)
            shape, sharding = row.shape(dims), shardings[row.path]
            names = dict(row.hf_tensors(dims))
            arrays: dict[parallel.Block, np.ndarray] = {}
            shards = []
            for device, block in parallel.local_blocks(sharding, shape).items():
                if block not in arrays:  # devices that hold copies share one read
                    array = np.empty([stop - start for start, stop in block], dtype)
                    hf_block = row.hf_index(block[num_stacked:], dims)
                    for stack_index, name in names.items():
                        part = opened[tensors[name].file].get_slice(name)[hf_block]
                        array[stack_index] = row.from_hf(part, dims).astype(dtype)
                    arrays[block] = array
                shards.append(jax.device_put(arrays[block], device))
            params[row.path] = jax.make_array_from_single_device_arrays(shape, sharding, shards)
            bar.update(len(names))
    return params


def to_tensors(
    params: Mapping[str, Any], rows: Iterable[Weight], dims: dict[str, int]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yield (HF name, function that returns the HF tensor) for every tensor of the rows."""
    held: dict[str, list[tuple[Weight, tuple[int, ...]]]] = {}
    for row in rows:
        for index, name in row.hf_tensors(dims):
            held.setdefault(name, []).append((row, index))

    def tensor(parts) -> np.ndarray:
        arrays = [row.to_hf(np.asarray(params[row.path][index]), dims) for row, index in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    for name, parts in held.items():
        yield name, functools.partial(tensor, sorted(parts, key=lambda part: part[0].place))


def save(
    params: Mapping[str, Any],
    rows: Iterable[Weight],
    dims: dict[str, int],
    dtypes: Mapping[str, str],
    out: Path,
    shard_bytes: int,
    progress: bool = True,
) -> list[str]:
    """Write the weights as safetensors files, one tensor at a time.

    Args:
        params: {our path: array that this process can read whole}.
        dtypes: {HF name: safetensors dtype}.
        out: an existing folder.
        shard_bytes: tensor bytes of a file at most, unless one tensor alone has more.

    Returns:
        Names of the files: one, or several and their index.
    """
    rows = list(rows)
    shapes = {name: row.hf_shape(dims) for row in rows for _, name in row.hf_tensors(dims)}
    sizes = {
        name: int(np.prod(shape)) * np.dtype(DTYPES[dtypes[name]]).itemsize
        for name, shape in shapes.items()
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    tensors = dict(to_tensors(params, rows, dims))
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    bar = tqdm(total=len(sizes), desc="writing weights", unit="tensor", disable=not progress)
    with bar:
        for file, names in zip(files, shards, strict=True):
            with open(out / file, "wb") as stream:
                _write_header(stream, names, shapes, sizes, dtypes)
                for name in names:
                    array = tensors[name]().astype(DTYPES[dtypes[name]])
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    bar.update()
                stream.flush()
                os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {n: f for f, names in zip(files, shards, strict=True) for n in names},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        files.append("model.safetensors.index.json")
    return files


def _write_header(stream: BinaryIO, names, shapes, sizes, dtypes) -> None:
    """Write a safetensors header: its length as little-endian u64, then JSON padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + sizes[name]
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(len(encoded).to_bytes(8, "little") + encoded)


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy config, generation config, tokenizer and chat template. Returns the names copied."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, out / name)
    return names
