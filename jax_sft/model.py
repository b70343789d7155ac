"""A model without its weights: bound to parameters, it turns tokens into hidden states."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft import tree
from jax_sft.compute import Compute, policy
from jax_sft.models.spec import Weight


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """What the step and inference need to know of a model.

    Attributes:
        cfg: the family's Config.
        rows: its weight rows.
        abstract: the NNX model with ShapeDtypeStructs as parameters.
        compute: how it computes.
    """

    cfg: Any
    rows: tuple[Weight, ...]
    abstract: Any
    compute: Compute

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
    ) -> "ModelDef":
        """Build from a family module and its Config, allocating nothing."""
        abstract = jax.eval_shape(lambda key: family.Model(cfg, key), jax.random.key(0))
        rows = family.weights(cfg)
        compute = Compute(
            dtype=jnp.dtype(dtype),
            grad_dtype=jnp.dtype(grad_dtype),
            attention=attention,
            max_segments=max_segments,
            policy=policy(remat, tuple(offload)),
            axes={row.path: row.axes for row in rows if row.is_matrix},
        )
        return cls(cfg, rows, abstract, compute)

    @property
    def has_experts(self) -> bool:
        """Whether layers have a router and experts."""
        return "experts" in self.cfg.dims

    def bind(self, params: dict[str, jax.Array]) -> Any:
        """Return the model with these parameters."""
        return tree.from_dict(self.abstract, params)

    def hidden(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return final hidden states [B, T, D] of a bound model."""
        return model(batch["tokens"], batch["segment_ids"], batch["positions"], self.compute)

    def routed(self, model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
        """Return (final hidden states, Routing of all layers) of a bound model with experts."""
        context = batch["segment_ids"], batch["positions"], self.compute
        return model.routed(batch["tokens"], *context)
