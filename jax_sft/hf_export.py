"""From a checkpoint to a Hugging Face folder, one tensor at a time and verified."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_sft import hf, lora, manifest, model_files, models, peft, steps, storage
from jax_sft.model import ModelDef

_PARAMS = "params/"


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    shard_bytes: int = 5_000_000_000,
    dtype: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a checkpoint as a Hugging Face folder that transformers loads.

    Args:
        checkpoint: the `checkpoints` folder of a run.
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
            empty.
    """
    checkpoint, out = Path(checkpoint).absolute(), Path(out).absolute()
    kept = checkpoint / model_files.NAME
    model_files.verify(checkpoint)
    if dtype and dtype not in hf.NAMES:
        raise ValueError(f"dtype {dtype!r} is not one of {list(hf.NAMES)}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: choose another folder, or overwrite it")
    folder = _choose(checkpoint, step)
    stored = _StoredParams(folder)
    config = hf.read_json(kept / "config.json")
    family = models.find(str(config.get("model_type")))
    cfg = family.Config.from_hf(config)
    metadata = steps.metadata(folder)
    dtypes = hf.read_json(kept / model_files.DTYPES_FILE)
    if dtype:
        dtypes = dict.fromkeys(dtypes, hf.NAMES[dtype])
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        if metadata.get("lora"):
            settings = lora.Settings(**metadata["lora"])
            adapted = lora.add(ModelDef.of(family, cfg, dtype="float32"), settings)
            model = metadata["config"]["model"]
            peft.save(stored, adapted, settings, unfinished, model["path"], model["revision"])
        else:
            hf.save(stored, family.weights(cfg), cfg.dims, dtypes, unfinished, shard_bytes, progress)
        hf.copy_side_files(kept, unfinished)
        if dtype:
            _set_dtype(unfinished / "config.json", dtype)
        unfinished.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _choose(checkpoint: Path, step: int | None) -> Path:
    """The folder of the wanted step.

    Raises:
        ValueError: there is none.
    """
    present = steps.present(checkpoint)
    if not present or (step is not None and step not in present):
        raise ValueError(
            f"{checkpoint} has no step {'' if step is None else step}: it has {present[::-1]}"
        )
    return checkpoint / str(present[0] if step is None else step)


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Record the dtype of an export that changes it."""
    config = hf.read_json(config_file)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


class _StoredParams(Mapping[str, np.ndarray]):
    """The parameters of a stored step, read one at a time and only the last one kept.

    Raises:
        ValueError: the files of the step are damaged; or, when it is read, a tensor is.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        check = steps.check(folder.parent, int(folder.name))
        if check.problems:
            self._refuse(check.problems)
        assert check.manifest
        arrays = check.manifest.arrays
        self._arrays = {
            name.removeprefix(_PARAMS): array
            for name, array in arrays.items()
            if name.startswith(_PARAMS)
        }
        self._last: tuple[str, np.ndarray] | None = None

    def _refuse(self, problems: Sequence[str]):
        others = [number for number in steps.present(self._folder.parent)][::-1]
        lines = "\n  ".join(manifest.shown(problems))
        raise ValueError(
            f"{self._folder} is damaged:\n  {lines}\nThe steps are {others}: choose --step"
        )

    def __getitem__(self, path: str) -> np.ndarray:
        if self._last is None or self._last[0] != path:
            self._last = None
            array, problem = storage.read_one(self._folder, _PARAMS + path, self._arrays[path])
            if problem:
                self._refuse([problem])
            self._last = (path, array)
        return self._last[1]

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
