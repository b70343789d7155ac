"""A model without its weights: bound to parameters, it turns tokens into hidden states."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft import tree
from jax_sft.models.spec import Weight


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """What the step and inference need to know of a model.

    Attributes:
        cfg: the family's Config.
        rows: its weight rows.
        abstract: the NNX model with ShapeDtypeStructs as parameters.
        dtype: of the activations.
        attention: key of ops.attention.BACKENDS.
        remat: key of models.layers.REMAT.
    """

    cfg: Any
    rows: tuple[Weight, ...]
    abstract: Any
    dtype: Any
    attention: str
    remat: str

    @classmethod
    def of(cls, family, cfg, *, dtype, attention: str = "auto", remat: str = "none") -> "ModelDef":
        """Build from a family module and its Config, allocating nothing."""
        abstract = jax.eval_shape(lambda key: family.Model(cfg, key), jax.random.key(0))
        return cls(cfg, family.weights(cfg), abstract, jnp.dtype(dtype), attention, remat)

    def bind(self, params: dict[str, jax.Array]) -> Any:
        """Return the model with these parameters, matrices in the compute dtype."""
        matrices = {row.path for row in self.rows if row.is_matrix}
        cast = {
            path: array.astype(self.dtype) if path in matrices else array
            for path, array in params.items()
        }
        return tree.from_dict(self.abstract, cast)

    def hidden(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return final hidden states [B, T, D] of a bound model."""
        return model(
            batch["tokens"],
            batch["segment_ids"],
            batch["positions"],
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
        )
