"""A model without its weights. Bound to parameters, it maps tokens to hidden states."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.nn.compute import Compute, policy
from jax_sft.weights import tree
from jax_sft.weights.param_spec import ParamSpec
from jax_sft.weights.vocabulary import Vocabulary, padded


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """The definition of a model for the train step and for inference.

    Attributes:
        cfg: the family's Config.
        specs: specs of its parameters, including those of its adapters.
        axis_sizes: size of each logical axis; the vocabulary is padded, unlike `cfg.vocab`.
        abstract: the NNX model with ShapeDtypeStructs as parameters.
        compute: settings of the computation.
        frozen_dtypes: {path: dtype in which it is stored} of the frozen parameters.
        layer_masks: {path: bool array over the stacked axes}, the trainable layers of parameters of
            which only some layers train.
        quantized: {path of a parameter: specs of the arrays that hold it quantized}.
        with_dropout: `abstract` with a random key for each dropout; None = no dropout.
    """

    cfg: Any
    specs: tuple[ParamSpec, ...]
    axis_sizes: dict[str, int]
    abstract: Any
    compute: Compute
    frozen_dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_masks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    quantized: Mapping[str, tuple[ParamSpec, ...]] = dataclasses.field(default_factory=dict)
    with_dropout: Any = None

    @classmethod
    def of(
        cls,
        family,
        cfg,
        *,
        dtype,
        grad_dtype: Any = "float32",
        attention: str = "auto",
        max_segments: int = 256,
        remat: str = "none",
        offload: Sequence[str] = (),
        vocab_shards: int = 1,
    ) -> "ModelDef":
        """Build a ModelDef from a family module and its Config, without allocating arrays.

        Args:
            vocab_shards: size of mesh.tensor; the vocabulary is padded to a multiple.
        """
        axis_sizes = padded(cfg.axis_sizes, vocab_shards)
        stored = dataclasses.replace(cfg, vocab=axis_sizes["vocab"])
        abstract = jax.eval_shape(lambda key: family.Model(stored, key), jax.random.key(0))
        specs = family.weights(cfg)
        compute = Compute(
            dtype=jnp.dtype(dtype),
            grad_dtype=jnp.dtype(grad_dtype),
            attention=attention,
            max_segments=max_segments,
            policy=policy(remat, tuple(offload)),
            axes={spec.path: spec.axes for spec in specs if spec.is_matrix},
        )
        return cls(cfg, specs, axis_sizes, abstract, compute)

    @property
    def has_experts(self) -> bool:
        """Whether layers have a router and experts."""
        return "experts" in self.cfg.axis_sizes

    def bind(self, params: dict[str, jax.Array], dropout_key: jax.Array | None = None) -> Any:
        """Return the model with these parameters, and with dropout if a key is given."""
        if dropout_key is None or self.with_dropout is None:
            return tree.from_dict(self.abstract, params)
        keys = {}
        for path, leaf in tree.to_dict(self.with_dropout).items():
            if path not in params:
                key = jax.random.fold_in(dropout_key, zlib.crc32(path.encode()))
                keys[path] = jax.random.split(key, leaf.shape)
        return tree.from_dict(self.with_dropout, params | keys)

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids and the arrays that have a row or a column per token id."""
        return Vocabulary.of(self.specs, self.cfg.vocab)

    @property
    def stored_specs(self) -> tuple[ParamSpec, ...]:
        """Specs of the arrays that `bind` expects, with quantized parameters as their parts."""
        return tuple(part for spec in self.specs for part in self.quantized.get(spec.path, (spec,)))

    @property
    def trainable_specs(self) -> tuple[ParamSpec, ...]:
        """Specs of the trainable parameters."""
        return tuple(spec for spec in self.specs if spec.path not in self.frozen_bytes)

    @property
    def frozen_bytes(self) -> dict[str, float]:
        """{path of a frozen parameter: stored bytes per element}."""
        bytes_per_element: dict[str, float] = {
            path: dtype.itemsize for path, dtype in self.frozen_dtypes.items()
        }
        for spec in self.specs:
            if spec.path in self.quantized:
                parts = self.quantized[spec.path]
                sizes = (
                    math.prod(part.shape(self.axis_sizes)) * bytes_per_element.pop(part.path)
                    for part in parts
                )
                bytes_per_element[spec.path] = sum(sizes) / math.prod(spec.shape(self.axis_sizes))
        return bytes_per_element

    def without_masters(self, paths: Iterable[str]) -> dict[str, np.dtype]:
        """Return {path: dtype} for frozen parameters: compute dtype for matrices, else float32."""
        matrices = {spec.path for spec in self.specs if spec.is_matrix}
        return {
            path: np.dtype(self.compute.dtype if path in matrices else np.float32) for path in paths
        }

    @property
    def head_trains(self) -> bool:
        """Whether the output head (the embedding in tied models) gets a gradient."""
        return ("embed.table" if self.cfg.tied else "head.table") not in self.frozen_dtypes

    def hidden(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return final hidden states [B, T, D] of a bound model."""
        return model(batch["tokens"], batch["segment_ids"], batch["positions"], self.compute)

    def routed(self, model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
        """Return (final hidden states, Routing of all layers) of a bound model with experts."""
        context = batch["segment_ids"], batch["positions"], self.compute
        return model.routed(batch["tokens"], *context)
