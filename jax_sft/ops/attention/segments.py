"""The order of a row's tokens, for attention kernels that need each segment in one piece.

Shape suffixes: B rows, T tokens. Called by the GPU backends, inside jit.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_sft.ops.attention.backend import Ids


def in_natural_order(ids: Ids) -> jax.Array:
    """Return whether each segment is contiguous with positions 0, 1, 2.. in order, bool [B]."""
    segments_BT, positions_BT = ids
    continues_BT = jnp.pad(
        (segments_BT[:, 1:] == segments_BT[:, :-1])
        & (positions_BT[:, 1:] == positions_BT[:, :-1] + 1),
        ((0, 0), (1, 0)),
    )
    return jnp.all((segments_BT == 0) | (positions_BT == 0) | continues_BT, axis=1)


def pad_tokens(arrays: Sequence[jax.Array], ids: Ids, multiple: int):
    """Pad dimension 1 of all arrays to a multiple with zeros, which mean padding in `ids`.

    Returns (tuple of arrays, ids), unchanged if the length already is a multiple.
    """
    missing = -ids[0].shape[1] % multiple
    if not missing:
        return tuple(arrays), ids

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    return tuple(map(pad, arrays)), (pad(ids[0]), pad(ids[1]))
