"""Products of rows that are sorted by group, each group with a matrix of its own.

What `jax.lax.ragged_dot` computes. On GPUs and CPUs XLA (jax 0.10.2) makes of that the product of
every row with every group's matrix: for 128 experts 128 times what is needed, and a copy of the
rows for each of them, 32 GiB for 65,536 rows of 2,048. Here the groups advance together, in rounds
of equal blocks that are one batched product, as many as the largest group needs. Any sizes are
exact, groups without rows and one with all of them too.

M rows, G groups, C rows of each group in a round; D and F the dimensions of a matrix.
"""

import jax
import jax.numpy as jnp

LOOP = "grouped_rounds"  # name of the loops whose trips the data decides, for `plan`
BLOCKS = 2  # of a group of mean size
TILE = 128  # rows that a GPU's matrix product takes at once
_SMALL_TILE = 8


def block_rows(num_rows: int, num_groups: int) -> int:
    """Return C: a part of the mean group, in whole tiles.

    Smaller blocks follow uneven groups more closely, larger ones read the matrices less often.
    """
    part = -(-num_rows // (BLOCKS * num_groups))
    tile = TILE if part > TILE // 2 else _SMALL_TILE
    return -(-part // tile) * tile


def matmul(x_MK: jax.Array, kernel: jax.Array, sizes_G: jax.Array, over: int) -> jax.Array:
    """Multiply each row with its group's matrix, in the dtype of the rows.

    Args:
        kernel: [G, D, F].
        sizes_G: int32 rows of each group, in order; what is left of M has no group.
        over: the dimension of the kernel that is summed over: 1 (rows are [M, D]) or 2 ([M, F]).

    Returns:
        [M, F] or [M, D]; zero where a row has no group.
    """
    num_rows = len(x_MK)
    kernel = kernel.astype(x_MK.dtype)
    block = block_rows(num_rows, len(kernel))

    def one_round(number, out):
        rows_GC, is_row_GC = _rows(sizes_G, number, block)
        x_GCK = x_MK.at[rows_GC].get(mode="clip")
        y_GCN = jax.lax.dot_general(x_GCK, kernel, (((2,), (over,)), ((0,), (0,))))
        # Other places than those of rows: beyond the end, each once.
        beyond_GC = num_rows + jnp.arange(rows_GC.size).reshape(rows_GC.shape)
        to_GC = jnp.where(is_row_GC, rows_GC, beyond_GC)
        return out.at[to_GC].set(y_GCN, mode="drop", unique_indices=True)

    zeros = jnp.zeros((num_rows, kernel.shape[3 - over]), x_MK.dtype)
    with jax.named_scope(LOOP):
        return jax.lax.fori_loop(0, _num_rounds(sizes_G, block), one_round, zeros)


def outer(x_MD: jax.Array, y_MF: jax.Array, sizes_G: jax.Array, dtype) -> jax.Array:
    """Sum the outer products of a group's rows: the gradient of its matrix.

    Returns:
        [G, D, F], formed and added up in `dtype`; zero for a group without rows.
    """
    block = block_rows(len(x_MD), len(sizes_G))

    def one_round(number, total):
        rows_GC, is_row_GC = _rows(sizes_G, number, block)
        # Both are cleared: what stands in other rows may be infinite.
        x_GCD, y_GCF = (
            jnp.where(is_row_GC[..., None], part.at[rows_GC].get(mode="clip"), 0)
            for part in (x_MD, y_MF)
        )
        dims = (((1,), (1,)), ((0,), (0,)))
        return total + jax.lax.dot_general(x_GCD, y_GCF, dims, preferred_element_type=dtype)

    zeros = jnp.zeros((len(sizes_G), x_MD.shape[1], y_MF.shape[1]), dtype)
    with jax.named_scope(LOOP):
        return jax.lax.fori_loop(0, _num_rounds(sizes_G, block), one_round, zeros)


def _rows(sizes_G, number, block: int) -> tuple[jax.Array, jax.Array]:
    """The rows that each group has in a round, [G, C], and which of them are its own."""
    within_C = number * block + jnp.arange(block)
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    return starts_G[:, None] + within_C, within_C < sizes_G[:, None]


def _num_rounds(sizes_G, block: int) -> jax.Array:
    return -(-sizes_G.max() // block)
