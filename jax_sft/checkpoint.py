"""Checkpoints of a run (Orbax), and their export to a Hugging Face folder.

A checkpoint folder is self-contained: steps (`params`, `optimizer` and JSON metadata each) and
`model_files`, the config and tokenizer of the model and the dtype of each of its tensors.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jax_sft import hf, models
from jax_sft.state import TrainState

MODEL_FILES = "model_files"
DTYPES_FILE = "tensor_dtypes.json"
FORMAT_VERSION = 1


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, newest and best steps kept.

    Args:
        folder: created if missing; leftovers of killed saves in it are removed.
        options: `cfg.checkpoint`.
    """

    def __init__(self, folder: Path, options):
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        keep: list = [policies.LatestN(max(options.keep, 1))]
        if options.keep_best:
            metric = options.metric
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[metric], n=options.keep_best, reverse=True
                )
            )
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()),
            save_decision_policy=decisions.FixedIntervalPolicy(1),  # when to save is up to `train`
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    def metadata(self) -> dict[str, Any]:
        """Return the JSON stored with the newest step."""
        custom: Any = self._checkpointer.metadata(self.latest_step).custom_metadata
        return custom or {}

    def save(self, state: TrainState, config: dict[str, Any], metrics: Mapping | None) -> None:
        """Start saving the state; returns once the arrays are copied off the devices.

        Args:
            config: the resolved config, stored with the step.
            metrics: evaluation metrics of this very step, for `keep_best`.
        """
        step = int(state.step)
        # The position in the data is the step itself (data.loader).
        custom = {"format_version": FORMAT_VERSION, "step": step, "config": config}
        self._checkpointer.save_checkpointables_async(
            step,
            {"params": state.params, "optimizer": _flat(state.opt_state)},
            metrics=dict(metrics) if metrics else None,
            custom_metadata=custom,
        )

    def restore(self, abstract: TrainState) -> TrainState:
        """Return the newest state, with the dtypes and shardings of `abstract`."""
        step = self.latest_step
        moments = _flat(abstract.opt_state)
        loaded = self._checkpointer.load_checkpointables(
            step, {"params": abstract.params, "optimizer": moments}
        )
        opt_state = jax.tree.unflatten(
            jax.tree.structure(abstract.opt_state), [loaded["optimizer"][name] for name in moments]
        )
        done = jax.device_put(np.int32(step or 0), abstract.step.sharding)
        return TrainState(step=done, params=loaded["params"], opt_state=opt_state)

    def close(self) -> None:
        """Wait for the running save and release everything."""
        self._checkpointer.close()


def _flat(opt_state: Any) -> dict[str, Any]:
    """Name the leaves of an optimizer state by their path, in flattening order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def keep_model_files(folder: Path, model_folder: Path, dtypes: Mapping[str, str]) -> None:
    """Copy config, tokenizer and tensor dtypes beside the steps, so that export needs no more.

    Args:
        folder: the checkpoint folder.
        dtypes: {HF name: safetensors dtype} of the original model.
    """
    out = folder / MODEL_FILES
    if out.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{MODEL_FILES}", dir=folder))
    hf.copy_side_files(model_folder, unfinished)
    (unfinished / DTYPES_FILE).write_text(json.dumps(dict(dtypes), indent=1))
    os.rename(unfinished, out)


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
        ValueError: no such checkpoint or step, an unknown dtype, or `out` is not empty.
    """
    checkpoint, out = Path(checkpoint).absolute(), Path(out).absolute()
    model_files = checkpoint / MODEL_FILES
    if not model_files.is_dir():
        raise ValueError(f"{checkpoint} is not a checkpoint folder: it has no {MODEL_FILES}")
    if dtype and dtype not in hf.NAMES:
        raise ValueError(f"dtype {dtype!r} is not one of {list(hf.NAMES)}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: choose another folder, or overwrite it")
    one_by_one = ocp.Context()
    one_by_one.pytree.loading.partial_load = True
    with ocp.training.Checkpointer(str(checkpoint), context=one_by_one) as checkpointer:
        steps = [found.step for found in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            raise ValueError(f"{checkpoint} has no step {step or ''}: it has {steps}")
        config = hf.read_json(model_files / "config.json")
        family = models.find(str(config.get("model_type")))
        cfg = family.Config.from_hf(config)
        rows = family.weights(cfg)
        dtypes = hf.read_json(model_files / DTYPES_FILE)
        if dtype:
            dtypes = dict.fromkeys(dtypes, hf.NAMES[dtype])
        stored = _StoredParams(checkpointer, steps[-1] if step is None else step)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            hf.save(stored, rows, cfg.dims, dtypes, unfinished, shard_bytes, progress)
            hf.copy_side_files(model_files, unfinished)
            if dtype:
                _set_dtype(unfinished / "config.json", dtype)
            unfinished.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            os.rename(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Record the dtype of an export that changes it."""
    config = hf.read_json(config_file)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


class _StoredParams(Mapping[str, np.ndarray]):
    """The parameters of a stored step, read one at a time and only the last one kept."""

    def __init__(self, checkpointer: ocp.training.Checkpointer, step: int):
        self._checkpointer, self._step = checkpointer, step
        tree = checkpointer.checkpointables_metadata(step).metadata["params"]
        on_cpu = SingleDeviceSharding(jax.devices("cpu")[0])
        self._abstract = {
            path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=on_cpu)
            for path, array in tree.items()
        }
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, path: str) -> np.ndarray:
        if self._last is None or self._last[0] != path:
            self._last = None
            loaded = self._checkpointer.load_checkpointables(
                self._step, {"params": {path: self._abstract[path]}}
            )
            self._last = (path, np.asarray(loaded["params"][path]))
        return self._last[1]

    def __iter__(self):
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)
