"""Shard parameters over a mesh. Separate from `param_spec`, which needs no JAX."""

from collections.abc import Iterable

from jax.sharding import Mesh, NamedSharding

from jax_sft.sharding import rules
from jax_sft.weights.param_spec import ParamSpec


def shardings(specs: Iterable[ParamSpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return {parameter path: sharding}, from the logical axes of each spec."""
    return {spec.path: rules.sharding(mesh, *spec.axes) for spec in specs}
