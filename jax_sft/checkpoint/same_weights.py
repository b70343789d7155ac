"""Check that all hosts have the same model under one path.

Each host reads only its shards of the weights, so a stale copy on one host would silently train a
mix of two models. `train` calls this before it loads weights. A single process compares nothing.
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

# Bytes of the weights that each process reads. A model up to this size is read whole. For a larger
# one, evenly spaced pieces of each tensor are read. 1 GiB takes about 1 s from the page cache.
BUDGET = 2**30
PIECE = 2**16
_THREADS = 4
_TIMEOUT_S = 600
_SHOWN = 10  # file names shown in a message


def check(folder: Path, adapter: Path | None = None, step: int | None = None) -> None:
    """Compare model folders over all processes, before weights are read.

    Every difference in config and tokenizer files, in headers, and in weights of up to BUDGET bytes
    is detected. In larger weights, a difference is detected if it touches one of the pieces that
    are read, as the weights of another training run do.

    Args:
        folder: the model folder that `hf_folder.resolve` returned.
        adapter: a folder with a PEFT adapter; None = no adapter.
        step: step of a checkpoint folder; None = the newest.

    Raises:
        ValueError: a process has other files; the message names it and the first that differ.
    """
    if cluster.num_processes() == 1:
        return
    file_digests = digests(folder, step)
    adapter_digests = digests(adapter) if adapter else {}
    file_digests |= {f"adapter/{name}": value for name, value in adapter_digests.items()}
    remedy = f"Every host must have the same files in {folder}: copy them again"
    names = sorted(file_digests)
    text = ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    cluster.check_same("files of the model", {"files": f"{text} ({listed})"}, remedy, _TIMEOUT_S)
    cluster.check_same("files of the model", file_digests, remedy, _TIMEOUT_S)


def digests(folder: Path, step: int | None = None) -> dict[str, str]:
    """Return {name: digest} of the files of a model, adapter or checkpoint folder."""
    whole = [folder / name for name in hf_folder.side_files(folder)]
    whole += [
        file
        for file in (folder / "adapter_config.json", folder / hf_folder.INDEX)
        if file.is_file()
    ]
    weights = sorted(folder.glob("*.safetensors"))
    if model_files.is_kept(folder):  # its manifests hold the checksums that loading compares
        chosen = folder.parent / str(step_folders.choose(folder.parent, step))
        whole += sorted(file for file in chosen.glob("*.json") if file.is_file())
    total = sum(file.stat().st_size for file in weights)
    share = min(1.0, BUDGET / max(total, 1))
    results = {os.path.relpath(file, folder): _file_digest(file) for file in whole}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        weight_digests = pool.map(lambda file: _tensors_digest(file, share), weights)
        return results | {
            file.name: digest for file, digest in zip(weights, weight_digests, strict=True)
        }


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with regular.open_regular(file) as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _tensors_digest(file: Path, share: float) -> str:
    """Return a digest of a safetensors file's header and of pieces with a share of each tensor."""
    digest = hashlib.sha256()
    with regular.open_regular(file) as opened:
        length = opened.read(8)
        header = opened.read(struct.unpack("<Q", length)[0])
        digest.update(length + header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for offset, size in _pieces(end - start, share):
                    position = 8 + len(header) + start + offset
                    digest.update(os.pread(opened.fileno(), size, position))
    return digest.hexdigest()[:16]


def _pieces(nbytes: int, share: float) -> list[tuple[int, int]]:
    """Return (offset, size) of evenly spaced pieces of a tensor, including its start and end."""
    count = max(int(nbytes * share) // PIECE, 2)
    if share >= 1 or count * PIECE >= nbytes:
        return [(offset, min(PIECE, nbytes - offset)) for offset in range(0, nbytes, PIECE)]
    return [((nbytes - PIECE) * n // (count - 1), PIECE) for n in range(count)]
