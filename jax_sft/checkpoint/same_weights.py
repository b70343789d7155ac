"""Whether all hosts have the same model under one path: each reads only its shards of the weights.

A stale copy on one host would train a mix of two models without a word. Called by `train` before
weights are loaded; processes that are alone compare nothing.
"""

import concurrent.futures
import hashlib
import json
import os
import struct
from pathlib import Path

from jax_sft.checkpoint import model_files
from jax_sft.files import regular, step_folders
from jax_sft.hosts import cluster
from jax_sft.weights import hf_folder

# Bytes of the weights that each process reads: all of a model up to this size, and of larger ones
# pieces of each tensor, evenly spaced. 1 GiB takes about a second from the page cache.
BUDGET = 2**30
PIECE = 2**16
_THREADS = 4
_TIMEOUT_S = 600
_SHOWN = 10  # names of files in a message


def check(folder: Path, adapter: Path | None = None, step: int | None = None) -> None:
    """Compare model folders over all processes, before weights are read.

    A difference is found with certainty in config and tokenizer files, in headers, and in weights
    of up to BUDGET bytes; in larger ones where it touches one of the pieces of some tensor, which a
    tensor of another training does.

    Args:
        folder: that `hf_folder.resolve` returned.
        adapter: a folder with a PEFT adapter; None = there is none.
        step: of a checkpoint folder; None = the newest.

    Raises:
        ValueError: a process has other files; it is named, with the first that differ.
    """
    if cluster.num_processes() == 1:
        return
    found = digests(folder, step)
    of_adapter = digests(adapter) if adapter else {}
    found |= {f"adapter/{name}": value for name, value in of_adapter.items()}
    remedy = f"Every host must have the same files in {folder}: copy them again"
    names = sorted(found)
    text = ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    cluster.check_same("files of the model", {"files": f"{text} ({listed})"}, remedy, _TIMEOUT_S)
    cluster.check_same("files of the model", found, remedy, _TIMEOUT_S)


def digests(folder: Path, step: int | None = None) -> dict[str, str]:
    """Return {name: digest} of the files of a model, adapter or checkpoint folder."""
    whole = [folder / name for name in hf_folder.side_files(folder)]
    whole += [
        file
        for file in (folder / "adapter_config.json", folder / hf_folder.INDEX)
        if file.is_file()
    ]
    weights = sorted(folder.glob("*.safetensors"))
    if model_files.is_kept(folder):  # its manifests have checksums, which loading compares
        chosen = folder.parent / str(step_folders.choose(folder.parent, step))
        whole += sorted(file for file in chosen.glob("*.json") if file.is_file())
    total = sum(file.stat().st_size for file in weights)
    share = min(1.0, BUDGET / max(total, 1))
    found = {os.path.relpath(file, folder): _of_file(file) for file in whole}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        of_weights = pool.map(lambda file: _of_tensors(file, share), weights)
        return found | {file.name: digest for file, digest in zip(weights, of_weights, strict=True)}


def _of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with regular.open_regular(file) as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _of_tensors(file: Path, share: float) -> str:
    """Digest the header of a safetensors file and this share of each tensor, or a piece of it."""
    digest = hashlib.sha256()
    with regular.open_regular(file) as opened:
        length = opened.read(8)
        header = opened.read(struct.unpack("<Q", length)[0])
        digest.update(length + header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for offset, size in _pieces(end - start, share):
                    at = 8 + len(header) + start + offset
                    digest.update(os.pread(opened.fileno(), size, at))
    return digest.hexdigest()[:16]


def _pieces(nbytes: int, share: float) -> list[tuple[int, int]]:
    """Return (offset, size) of evenly spaced pieces of a tensor, its start and end among them."""
    count = max(int(nbytes * share) // PIECE, 2)
    if share >= 1 or count * PIECE >= nbytes:
        return [(offset, min(PIECE, nbytes - offset)) for offset in range(0, nbytes, PIECE)]
    return [((nbytes - PIECE) * n // (count - 1), PIECE) for n in range(count)]
