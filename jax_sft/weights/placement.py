"""Where parameters are on a mesh. Apart from their description, which needs no JAX."""

from collections.abc import Iterable

from jax.sharding import Mesh, NamedSharding

from jax_sft.sharding import rules
from jax_sft.weights.param_spec import Weight


def shardings(rows: Iterable[Weight], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return {our path: sharding}, by the logical axes of each row."""
    return {row.path: rules.sharding(mesh, *row.axes) for row in rows}
