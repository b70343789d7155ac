"""From a checkpoint to a Hugging Face folder, in blocks of a tensor and verified."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_sft import hf, model_files, models, steps, storage
from jax_sft.models.spec import Weight

SHARD_BYTES = 5_000_000_000


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a checkpoint as a Hugging Face folder that transformers loads.

    Args:
        checkpoint: the `checkpoints` folder of a run, or what `hf_convert` made.
        out: the folder to write; it appears only when complete.
        step: which step; None = the newest.
        shard_bytes: largest safetensors file.
        dtype: "float32", "bfloat16" or "float16" for all tensors; "" = each tensor's own dtype in
            the model that was fine-tuned.
        overwrite: replace `out` if it exists and is not empty.

    Returns:
        `out`.

    Raises:
        ValueError: no such checkpoint or step, a damaged one, an unknown dtype, or `out` is not
            empty or has no room.
    """
    out = Path(out).absolute()
    planned = plan(checkpoint, step=step, shard_bytes=shard_bytes, dtype=dtype)
    hf.check_out(out, planned.layout.nbytes, overwrite)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        hf.save(
            _Params(planned),
            planned.rows,
            planned.dims,
            planned.dtypes,
            unfinished,
            shard_bytes,
            progress,
        )
        hf.copy_side_files(planned.kept, unfinished)
        if dtype:
            _set_dtype(unfinished / "config.json", dtype)
        hf.put_in_place(unfinished, out)
    except storage.Failed as error:
        raise ValueError(steps.damaged(planned.folder, planned.step, [str(error)])) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export reads and writes, known without reading an array.

    Attributes:
        folder: the checkpoint folder.
        arrays: {our path: {"shape", "dtype", "sum"}}.
        dtypes: {HF name: safetensors dtype}.
    """

    folder: Path
    step: int
    arrays: Mapping[str, dict[str, Any]]
    rows: tuple[Weight, ...]
    dims: dict[str, int]
    dtypes: Mapping[str, str]
    layout: hf.Layout

    @property
    def kept(self) -> Path:
        """The files of the model."""
        return self.folder / model_files.NAME

    def lines(self) -> Iterator[str]:
        """Say for every tensor where it comes from, what it is and which file gets it."""
        for row in self.rows:
            array = self.arrays[row.path]
            for index, name in row.hf_tensors(self.dims):
                place = self.layout.tensors[name]
                ours = f"{row.path}{[*index] if index else ''}"
                yield (
                    f"{ours} {array['dtype']} {array['shape'][len(index) :]}"
                    f" -> {name} {place.dtype} {[*place.shape]} in {place.file}"
                )
        yield (
            f"step {self.step}: {len(self.rows)} arrays -> {len(self.layout.tensors)} tensors, "
            f"{self.layout.nbytes / 1e9:.3f} GB in {len(self.layout.headers)} files; "
            f"beside them {', '.join(hf.side_files(self.kept))}"
        )


def plan(
    checkpoint: str | Path,
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "",
) -> Plan:
    """Check a checkpoint and plan its export. The arguments are those of `export`.

    Raises:
        ValueError: no such checkpoint or step, a damaged one, or an unknown dtype.
    """
    folder = Path(checkpoint).absolute()
    model_files.verify(folder)
    if dtype and dtype not in hf.NAMES:
        raise ValueError(f"dtype {dtype!r} is not one of {list(hf.NAMES)}")
    step = steps.choose(folder, step)
    arrays = steps.params(folder, step)
    config = hf.read_json(folder / model_files.NAME / "config.json")
    family = models.find(str(config.get("model_type")))
    cfg = family.Config.from_hf(config)
    rows, dtypes = family.weights(cfg), model_files.dtypes(folder)
    if problems := steps.misfits(arrays, {row.path: row.shape(cfg.dims) for row in rows}):
        raise ValueError(f"{folder / str(step)} does not fit its config.json: {problems}")
    if dtype:
        dtypes = dict.fromkeys(dtypes, hf.NAMES[dtype])
    layout = hf.layout(rows, cfg.dims, dtypes, shard_bytes)
    return Plan(folder, step, arrays, rows, cfg.dims, dtypes, layout)


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Record the dtype of an export that changes it."""
    config = hf.read_json(config_file)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


class _Params(Mapping[str, storage.Stored]):
    """The parameters of a stored step, each opened when it is asked for."""

    def __init__(self, planned: Plan):
        self._planned = planned

    def __getitem__(self, path: str) -> storage.Stored:
        folder = self._planned.folder / str(self._planned.step)
        return storage.Stored(folder, steps.PARAMS + path, self._planned.arrays[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned.arrays)

    def __len__(self) -> int:
        return len(self._planned.arrays)
