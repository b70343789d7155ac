"""Load a model and compute logits or greedy answers.

Greedy decoding recomputes every position for each new token. That is fast enough for a few answers
during training, but not for serving.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_sft import models
from jax_sft.adapters import lora, peft
from jax_sft.checkpoint import pretrained
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.attention import self_test
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import single_device_mesh
from jax_sft.weights import hf_folder, placement


class LoadedModel:
    """A model with its weights on a mesh.

    Attributes:
        model_def: the model without its weights.
        params: {path: array}, sharded.
        mesh: the mesh of `params`.
    """

    def __init__(self, model_def: ModelDef, params: dict[str, jax.Array], mesh: Mesh):
        self.model_def, self.params, self.mesh = model_def, params, mesh
        self._vocab = model_def.cfg.vocab
        self._max_segments = model_def.compute.max_segments

        def logits(params, batch):
            model = model_def.bind(params)
            hidden_BTD = model_def.hidden(model, batch)
            head_VD = model.head_VD.astype(hidden_BTD.dtype)
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32
            )
            logits_BTV = logits_BTV[..., : model_def.cfg.vocab]
            cap = model_def.cfg.logit_soft_cap
            return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV

        def next_tokens(params, batch, last_B):
            model = model_def.bind(params)
            hidden_BTD = model_def.hidden(model, batch)
            hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
            head_VD = model.head_VD.astype(hidden_BD.dtype)
            logits_BV = jnp.einsum(
                "BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32
            )
            logits_BV = logits_BV[:, : model_def.cfg.vocab]
            return logits_BV.argmax(axis=-1)  # a soft cap does not change the order of logits

        replicated = rules.sharding(mesh)
        self._logits = jax.jit(logits, out_shardings=replicated)
        self._next_tokens = jax.jit(next_tokens, out_shardings=replicated)

    def logits(self, tokens, segment_ids=None, positions=None) -> jax.Array:
        """Return next-token logits, float32 [B, T, V].

        Args:
            tokens: int [B, T] token ids.
            segment_ids: int [B, T]; tokens attend only to their own segment, which must be
                contiguous. None = each row is one segment.
            positions: int [B, T]; None = counted from the start of each segment.

        Raises:
            ValueError: the shapes differ, a token id is outside the vocabulary, or a row has more
                segments than the attention supports.
        """
        tokens = np.asarray(tokens)
        segment_ids = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
        if positions is None:
            positions = positions_of(segment_ids)
        positions = np.asarray(positions)
        if tokens.ndim != 2 or not tokens.shape == segment_ids.shape == positions.shape:
            raise ValueError(
                f"tokens, segment_ids and positions must all be [B, T], not {tokens.shape}, "
                f"{segment_ids.shape}, {positions.shape}"
            )
        if not tokens.size:
            raise ValueError(f"tokens are empty: {list(tokens.shape)}")
        if not 0 <= tokens.min() <= tokens.max() < self._vocab:
            raise ValueError(
                f"token ids must be in 0..{self._vocab - 1}, not {tokens.min()}..{tokens.max()}"
            )
        num_segments = max((len(np.unique(row)) for row in segment_ids), default=0)
        if num_segments > self._max_segments:
            raise ValueError(f"a row has {num_segments} segments: use at most {self._max_segments}")
        rows, seq_len = tokens.shape
        # Renumber from 1 without gaps, because 0 is the padding that `_batch` may add.
        indices = (np.unique(row, return_inverse=True)[1] for row in segment_ids)
        segment_ids = 1 + np.stack([*indices]).reshape(tokens.shape)
        batch = self._batch(tokens=tokens, segment_ids=segment_ids, positions=positions)
        with jax.set_mesh(self.mesh):
            return self._logits(self.params, batch)[:rows, :seq_len]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Continue each prompt with its most likely tokens.

        Args:
            prompts: token ids of each prompt.
            stop_ids: token ids that end the answer to a prompt.

        Returns:
            The new tokens of each prompt, without the stop token.

        Raises:
            ValueError: a prompt is empty, or a token id is outside the vocabulary.
        """
        if not prompts:
            return []
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = [token for prompt in prompts for token in prompt]
        if not lengths.all() or not 0 <= min(ids) <= max(ids) < self._vocab:
            raise ValueError(f"prompts must have tokens, ids in 0..{self._vocab - 1}")
        tokens = np.zeros((len(prompts), lengths.max() + max_new_tokens), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        active = np.ones(len(prompts), bool)
        ends = lengths.copy()
        for _ in range(max_new_tokens):
            batch = self._batch(
                tokens=tokens, segment_ids=positions < ends[:, None], positions=positions
            )
            last = np.pad(ends - 1, (0, batch["tokens"].shape[0] - len(prompts)))
            with jax.set_mesh(self.mesh):
                next_ids = np.asarray(self._next_tokens(self.params, batch, last))[: len(prompts)]
            active &= ~np.isin(next_ids, stop_ids)
            if not active.any():
                break
            tokens[active, ends[active]] = next_ids[active]
            ends[active] += 1
        spans = zip(tokens, lengths, ends, strict=True)
        return [row[start:end].tolist() for row, start, end in spans]

    def _batch(self, **arrays: np.ndarray) -> dict[str, jax.Array]:
        """Pad arrays to multiples of the mesh (segment 0 is padding) and put them on devices."""
        sharding = rules.sharding(self.mesh, "batch", "token")
        sizes = self.mesh.shape
        multiples = (sizes["data"] * sizes["fsdp"], sizes["sequence"] * sizes["tensor"])
        batch = {}
        for name, array in arrays.items():
            padding = [(0, -n % m) for n, m in zip(array.shape, multiples, strict=True)]
            padded = np.pad(np.asarray(array, np.int32), padding)
            batch[name] = jax.make_array_from_callback(
                padded.shape, sharding, lambda index, padded=padded: padded[index]
            )
        return batch


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Return positions counted from the start of each contiguous segment, int32 [B, T]."""
    index = np.broadcast_to(np.arange(segment_ids.shape[-1]), segment_ids.shape)
    starts = np.ones(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)).astype(np.int32)


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = "float32",
    *,
    adapter: str | Path = "",
    revision: str = "",
    step: int | None = None,
    attention: str = "auto",
    progress: bool = False,
) -> LoadedModel:
    """Load a Hugging Face model folder (or hub id) onto a mesh.

    Args:
        folder: a folder with config.json and safetensors files, a hub id, a run, its checkpoint
            folder, or a step in that.
        mesh: mesh with the axes data, fsdp, tensor and sequence (`make_mesh`); None = one device.
        dtype: dtype of the weights and the computation.
        adapter: a folder with LoRA adapters in PEFT's format; "" = none.
        revision: commit or tag of a hub id; "" = its main branch.
        step: step of a checkpoint folder; None = the newest.
        attention: "auto" or the name of an attention backend.
        progress: whether to show a progress bar while the weights are read.

    Raises:
        ValueError: the model is not supported, or its tensors do not fit its config.json.
    """
    path = hf_folder.resolve(str(folder), revision)
    step = hf_folder.step_of(str(folder), step)
    config = hf_folder.read_json(path / "config.json")
    family, cfg = models.read(config)
    mesh = single_device_mesh() if mesh is None else mesh
    shards = mesh.shape["tensor"]
    attention = _attention(attention, cfg, jnp.dtype(dtype).name, mesh)
    model_def = ModelDef.of(family, cfg, dtype=dtype, attention=attention, vocab_shards=shards)
    specs = model_def.specs
    weights = pretrained.find(path, specs, cfg.axis_sizes, cfg.tied, step, vocab_shards=shards)
    if adapter:
        model_def = lora.add(model_def, peft.read_settings(Path(adapter)))
        peft.check(Path(adapter), model_def)
    arrays = {spec.path: (spec.axes, spec.shape(model_def.axis_sizes)) for spec in model_def.specs}
    if problems := rules.size_problems(arrays, mesh.shape):
        raise ValueError("the mesh does not fit the model:\n  " + "\n  ".join(problems))
    params = weights.load(placement.shardings(specs, mesh), jnp.dtype(dtype), progress)
    if adapter:
        params |= peft.load(Path(adapter), model_def, mesh, jnp.dtype(dtype))
    return LoadedModel(model_def, params, mesh)


def _attention(name: str, cfg: Any, dtype: str, mesh: Mesh) -> str:
    """Return the attention to use; on GPUs "auto" skips backends that fail a test, and warns."""
    if name != "auto" or mesh.devices.flat[0].platform != "gpu":
        return name
    return self_test.choose(
        name,
        say=lambda line: warnings.warn(line, stacklevel=3),
        mesh=mesh,
        dtype=dtype,
        head_dim=cfg.head_dim,
        num_heads_per_kv=cfg.num_heads // cfg.num_kv_heads,
        has_window=cfg.window is not None,
        has_soft_cap=cfg.attention_soft_cap > 0,
    )
