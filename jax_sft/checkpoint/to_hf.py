"""Export a checkpoint to a Hugging Face folder, block by block and with verified checksums.

A run with adapters is exported to a PEFT folder, or merged into its base model.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft import models
from jax_sft.adapters import freeze, lora, peft
from jax_sft.checkpoint import block_readers, model_files, orbax_io, pretrained, stop_tokens
from jax_sft.files import outputs, paths, step_folders, sums
from jax_sft.nn.model_def import ModelDef
from jax_sft.runtime.text import at_most
from jax_sft.weights import hf_folder, hf_reader, hf_writer
from jax_sft.weights.blocks import BlockReader
from jax_sft.weights.param_spec import ParamSpec

SHARD_BYTES = 5_000_000_000
RUN_EXPORT = "export"  # the export's folder in the folder of a run


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "",
    merge: bool = False,
    base: str = "",
    overwrite: bool = False,
    progress: bool = True,
    tokenizer_eos: bool = False,
    say: Callable[[str], object] = print,
) -> Path:
    """Write a checkpoint as a Hugging Face folder for transformers, or its adapters for PEFT.

    Generation with the export also stops at the tokens that end the trained turns. They are
    appended to eos_token_id in generation_config.json and config.json. An adapter folder gets only
    the generation_config.json, which engines use if it is passed to them.

    Args:
        checkpoint: a run, its checkpoint folder, a step folder, or a folder from `hf_convert`.
        out: the folder to write. It appears only when complete, with the sha256 of each file in
            SHA256SUMS.
        step: the step to export; None = the newest.
        shard_bytes: size limit of a safetensors file.
        dtype: "float32", "bfloat16" or "float16" for all tensors; "" = each tensor's own dtype in
            the base model. Adapters are float32.
        merge: add adapters to the weights of their base model, and write the merged model. For
            4-bit weights, these are the dequantized values that the adapters were trained with.
        base: folder of the frozen weights; "" = the run's model.path.
        overwrite: replace an older export in `out` if nobody changed it.
        tokenizer_eos: also make the token that ends most trained turns the tokenizer's eos_token.
        say: called with lines about the stop tokens and the leftovers of killed exports.

    Returns:
        `out`.

    Raises:
        ValueError: the checkpoint or step is missing or damaged, the dtype is unknown, the frozen
            weights differ from those of the run, or `out` may not be written or lacks space.
        OSError: a file operation failed; an older export is unchanged.
    """
    folder, step = step_folders.locate(paths.local(checkpoint, "--checkpoint"), step)

    def write(chosen: int | None) -> Path:
        planned = _plan(folder, chosen, shard_bytes, dtype, merge, base)
        return _export(planned, out, shard_bytes, dtype, overwrite, progress, tokenizer_eos, say)

    return step_folders.newest_again(folder, step, write, say)


def _export(
    planned: "Plan",
    out: str | Path,
    shard_bytes: int,
    dtype: str,
    overwrite: bool,
    progress: bool,
    tokenizer_eos: bool,
    say: Callable[[str], object],
) -> Path:
    """Write the planned export; see `export` for the arguments."""
    place = outputs.check(out, outputs.EXPORT, overwrite=overwrite, reads=planned.reads)
    outputs.check_room(place.out, planned.layout.nbytes)
    eos = stop_tokens.eos_text(planned.kept, planned.turn_ends) if tokenizer_eos else ""
    try:
        with outputs.unfinished(place.out, say) as folder:
            hashes = hf_writer.save(
                _Params(planned),
                planned.specs,
                planned.axis_sizes,
                planned.dtypes,
                folder,
                shard_bytes,
                progress,
                planned.single,
            )
            hf_folder.copy_side_files(planned.kept, folder)
            stop_tokens.write(folder, planned.stops)
            if eos:
                stop_tokens.set_tokenizer_eos(folder, eos)
            if planned.is_adapter:
                _describe_adapter(planned, folder)
            elif dtype:
                _set_dtype(folder / "config.json", dtype)
            about = planned.about(tokenizer_eos)
            # SHA256SUMS is written last, as it hashes all other files.
            sums.write(folder, outputs.EXPORT, about, hashes)
            outputs.put_in_place(folder, place)
        say(planned.stop_line)
    except orbax_io.Failed as error:
        raise ValueError(
            step_folders.damaged(planned.folder, planned.step, [str(error)])
        ) from error
    return paths.local(out, "--out")


def check_run_export(workdir: Path, say: Callable[[str], object] = print) -> None:
    """Check that a run may write its export at its end, and remove leftovers of killed runs.

    Raises:
        ValueError: the export folder of the run holds something else.
        OSError: a file operation failed.
    """
    folder = workdir / RUN_EXPORT
    place = outputs.check(
        *(folder, outputs.EXPORT),
        overwrite=True,
        key="train.export",
        quick=True,
        remedy="Move that away, or start with --config.train.export=False and export elsewhere",
    )
    outputs.remove_leftovers(place.out, say)


def export_run(
    workdir: Path, *, tokenizer_eos: bool = False, say: Callable[[str], object] = print
) -> Path:
    """Export the newest step of a run into the run's folder, unless it is exported already.

    Args:
        tokenizer_eos, say: see `export`.

    Raises:
        ValueError, OSError: see `export`.
    """
    out = workdir / RUN_EXPORT
    planned = plan(workdir / "checkpoints")
    old = sums.read(out)
    if old and old.kind == outputs.EXPORT and old.about == planned.about(tokenizer_eos):
        problems = sums.check(out, old, hashes=False)
        note = f" ({'; '.join(at_most(problems, 5))})" if problems else ""
        say(f"{out} holds step {planned.step} already, and is left alone{note}")
        return out
    check_run_export(workdir, say)
    export(
        *(planned.folder, out),
        step=planned.step,
        overwrite=True,
        tokenizer_eos=tokenizer_eos,
        say=say,
    )
    say(str(out))
    return out


@dataclasses.dataclass(frozen=True)
class Plan:
    """An export's inputs and outputs, determined without reading any array.

    Attributes:
        folder: the checkpoint folder.
        metadata: metadata of the step.
        arrays: {parameter path: {"shape", "dtype", "sum"}} of the stored parameters.
        model_def: the model as it was trained.
        settings: settings of the adapters; None = no adapters.
        weights: the frozen weights; None = not needed.
        specs: the weights that are written.
        dtypes: {HF name: safetensors dtype}.
        base: `base` of `export` or the run's model.path, as an absolute path; None = neither is
            set. A hub id gives a path that does not exist.
        kept_files: {file stored in model_files: (bytes, sha256)}.
    """

    folder: Path
    step: int
    metadata: dict[str, Any]
    arrays: Mapping[str, dict[str, Any]]
    model_def: ModelDef
    settings: lora.AdapterSettings | None
    weights: pretrained.Weights | None
    specs: tuple[ParamSpec, ...]
    dtypes: Mapping[str, str]
    layout: hf_writer.Layout
    base: Path | None
    kept_files: Mapping[str, tuple[int, str]]

    @property
    def reads(self) -> list[Path]:
        """Folders that the export reads and must not overwrite."""
        return [self.folder, *([self.base] if self.base else [])]

    def about(self, tokenizer_eos: bool) -> dict[str, Any]:
        """Return a record that identifies this export: step, content digest, number of files."""
        content = [self.arrays, self.metadata.get("frozen"), self.dtypes, self.kept_files]
        content += [self.stops, tokenizer_eos]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return {"step": self.step, "content": digest, "files": len(self.layout.headers)}

    @property
    def axis_sizes(self) -> dict[str, int]:
        return self.model_def.axis_sizes

    @property
    def is_adapter(self) -> bool:
        """Whether only adapters are written."""
        return any(spec.path.endswith(".lora.a.kernel") for spec in self.specs)

    @property
    def single(self) -> str:
        """Name of the weights file when one file holds all weights."""
        return peft.WEIGHTS if self.is_adapter else hf_folder.SINGLE

    @property
    def kept(self) -> Path:
        """Folder of the stored model files."""
        return self.folder / model_files.NAME

    @property
    def turn_ends(self) -> dict[int, int] | None:
        """Return the tokens that end the trained turns (`stop_tokens`); None = not recorded."""
        return stop_tokens.stored(self.metadata)

    @functools.cached_property
    def stops(self) -> dict[str, dict[str, Any]]:
        """{file: new content} of the files that change to stop at the ends of trained turns."""
        changed = stop_tokens.changes(self.kept, self.turn_ends or {}, self.axis_sizes["vocab"])
        if self.is_adapter:  # an adapter folder has no config.json
            changed.pop(stop_tokens.CONFIG, None)
        return changed

    @property
    def stop_line(self) -> str:
        """Return the line that says at which tokens generation with the export stops."""
        line = stop_tokens.export_line(self.kept, self.turn_ends, self.stops)
        if self.is_adapter and self.stops:
            line += (
                "; the model that the adapter belongs to does not know it: give the engine this "
                "file (vLLM: --generation-config, transformers: GenerationConfig.from_pretrained)"
            )
        return line

    def read(self, path: str) -> np.ndarray:
        """Read one array of the step.

        Raises:
            Failed: the array is damaged.
        """
        stored = self.stored(path)
        array = stored[tuple(slice(0, size) for size in stored.shape)]
        stored.finish()
        return array

    def stored(self, path: str) -> orbax_io.Stored:
        """Open one array of the step."""
        array = self.arrays[path]
        shape = self.model_def.vocabulary.cut(path, array["shape"])
        return orbax_io.Stored(
            self.folder / str(self.step), step_folders.PARAMS + path, array, shape
        )

    def lines(self) -> Iterator[str]:
        """Yield a line per tensor (source, dtype, shape, file), then totals and stop tokens."""
        for spec in self.specs:
            for index, name in spec.hf_tensors(self.axis_sizes):
                if place := self.layout.tensors.get(name):
                    yield (
                        f"{spec.path}{[*index] if index else ''} {self._source(spec)}"
                        f" -> {name} {place.dtype} {[*place.shape]} in {place.file}"
                    )
        yield (
            f"step {self.step}: {len(self.specs)} arrays -> {len(self.layout.tensors)} tensors, "
            f"{self.layout.nbytes / 1e9:.3f} GB in {len(self.layout.headers)} files; "
            f"next to them {', '.join(hf_folder.side_files(self.kept))}"
        )
        yield self.stop_line

    def _source(self, spec: ParamSpec) -> str:
        if spec.path in self.arrays:
            array = self.arrays[spec.path]
            return f"{array['dtype']} {array['shape'][len(spec.stacked) :]}"
        has_adapter = spec.path.replace(".kernel", ".lora.a.kernel") in self.arrays
        return "of the model" + " and its adapter" * has_adapter


def plan(
    checkpoint: str | Path,
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "",
    merge: bool = False,
    base: str = "",
) -> Plan:
    """Check a checkpoint and plan its export. See `export` for the arguments.

    Raises:
        ValueError: the checkpoint or step is missing or damaged, or the dtype is unknown.
    """
    folder, step = step_folders.locate(paths.local(checkpoint, "--checkpoint"), step)
    return step_folders.newest_again(
        folder, step, lambda chosen: _plan(folder, chosen, shard_bytes, dtype, merge, base)
    )


def _plan(
    folder: Path, step: int | None, shard_bytes: int, dtype: str, merge: bool, base: str
) -> Plan:
    """Return the plan of a step; see `export` for the other arguments."""
    kept = model_files.verify(folder).manifest
    assert kept
    if dtype and dtype not in hf_reader.NAMES:
        raise ValueError(f"dtype {dtype!r} is not one of {list(hf_reader.NAMES)}")
    step = step_folders.choose(folder, step)
    arrays, metadata = step_folders.params(folder, step), step_folders.metadata(folder / str(step))
    config = hf_folder.read_json(folder / model_files.NAME / "config.json")
    model_def = ModelDef.of(*models.read(config), dtype="float32")
    model_specs, settings = model_def.specs, None
    if described := metadata.get("lora"):
        settings = lora.AdapterSettings(**described | {"targets": tuple(described["targets"])})
    if merge and not settings:
        raise ValueError(f"{folder} has no adapters: there is nothing to merge")
    run_config = metadata.get("config") or {}
    frozen = run_config.get("train", {}).get("freeze", ())
    model_def = freeze.choose(model_def, settings, frozen)
    specs = {spec.path: spec for spec in model_def.trainable_specs}
    shapes = {path: spec.shape(model_def.axis_sizes) for path, spec in specs.items()}
    if problems := step_folders.misfits(arrays, shapes, model_def.vocabulary.cut):
        raise ValueError(f"{folder / str(step)} does not fit its config.json: {problems}")
    weights = None
    if settings and not merge:
        names = [name for spec in specs.values() for _, name in peft.tensors(spec, model_def)]
        written = tuple(peft.joined(spec) for spec in specs.values())
        dtypes, single = dict.fromkeys(names, "F32"), peft.WEIGHTS
    else:
        dtypes, written, single = model_files.dtypes(folder), model_specs, hf_folder.SINGLE
        if dtype:
            dtypes = dict.fromkeys(dtypes, hf_reader.NAMES[dtype])
        if model_def.frozen_dtypes:
            weights = _weights(run_config, base, model_specs, model_def)
    layout = hf_writer.layout(written, model_def.axis_sizes, dtypes, shard_bytes, single)
    base_folder = base or run_config.get("model", {}).get("path", "")
    return Plan(
        *(folder, step, metadata, arrays, model_def, settings, weights, written, dtypes, layout),
        base=Path(os.path.abspath(os.path.expanduser(base_folder))) if base_folder else None,
        kept_files=kept.files,
    )


def _weights(
    run_config: Mapping[str, Any], base: str, specs: tuple[ParamSpec, ...], model_def: ModelDef
) -> pretrained.Weights:
    """Open the frozen weights, which the checkpoint does not store.

    Raises:
        ValueError: the weights are missing, or belong to another model.
    """
    path, revision = (base, "") if base else (run_config["model"][n] for n in ("path", "revision"))
    try:
        folder, step = hf_folder.resolve(path, revision), hf_folder.step_of(path)
        return pretrained.find(folder, specs, model_def.axis_sizes, model_def.cfg.tied, step)
    except ValueError as error:
        raise ValueError(
            "the checkpoint stores only the trained weights; the frozen weights of "
            f"{path!r} cannot be used: {error}. If the base model was moved, pass --base"
        ) from error


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Record the dtype of an export that changes it."""
    config = hf_folder.read_json(config_file)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _describe_adapter(planned: Plan, out: Path) -> None:
    """Remove unchanged model configs from an export, and write the adapter's config."""
    for name in {stop_tokens.CONFIG, stop_tokens.GENERATION} - {*planned.stops}:
        (out / name).unlink(missing_ok=True)
    model = planned.metadata["config"]["model"]
    assert planned.settings
    peft.write_config(out, planned.model_def, planned.settings, model["path"], model["revision"])


class _Params(Mapping[str, BlockReader | np.ndarray]):
    """Mapping from parameter path to the array to write, opened on access."""

    def __init__(self, planned: Plan):
        self._planned = planned

    def __getitem__(self, path: str) -> BlockReader | np.ndarray:
        planned = self._planned
        spec = next(spec for spec in planned.model_def.specs if spec.path == path)
        if peft.joined(spec) != spec:
            return peft.widened(planned.read(path), spec)
        if path in planned.arrays:
            # With adapters on some layers only, a reader would never get the blocks of the other
            # layers, and its `finish` requires all blocks. So the whole array is read at once.
            is_partly_written = planned.is_adapter and path in planned.model_def.layer_masks
            return planned.read(path) if is_partly_written else planned.stored(path)
        assert planned.weights
        blocks, recorded = planned.weights.blocks(path), planned.metadata["frozen"]
        if path in planned.model_def.quantized:
            frozen = block_readers.Packed(blocks, planned.model_def, path, recorded)
        else:
            frozen = block_readers.Checked(blocks, recorded[path], path)
        stem = path.removesuffix(".kernel") + ".lora"
        if f"{stem}.a.kernel" not in planned.arrays:
            return frozen
        parts = [planned.read(f"{stem}.{part}.kernel") for part in "ab"]
        magnitude_path = f"{stem}.magnitude"
        magnitude = planned.read(magnitude_path) if magnitude_path in planned.arrays else None
        assert planned.settings
        return block_readers.Merged(frozen, spec, (*parts, magnitude), planned.settings)

    def __iter__(self) -> Iterator[str]:
        return (spec.path for spec in self._planned.specs)

    def __len__(self) -> int:
        return len(self._planned.specs)
