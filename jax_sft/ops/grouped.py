"""Matrix products of rows sorted by group, with one matrix per group.

Computes the same as `jax.lax.ragged_dot`. On GPUs and CPUs XLA (jax 0.10.2) lowers that to the
product of every row with every group's matrix. With 128 experts that is 128 times the work, and a
copy of the rows per expert: 32 GiB for 65,536 rows of 2,048. Instead, all groups run in rounds. A
round is one batched product of equal blocks, and the largest group decides the number of rounds.
The result is exact for any sizes, including empty groups and one group with all rows.

M rows, G groups, C rows of each group in a round; D and F the dimensions of a matrix.
"""

import jax
import jax.numpy as jnp

LOOP = "grouped_rounds"  # `plan` looks for this name: loops whose trip count depends on data
BLOCKS = 2  # blocks per group of mean size
TILE = 128  # rows of a tile of a GPU's matrix product
_SMALL_TILE = 8


def block_rows(num_rows: int, num_groups: int) -> int:
    """Return C, the rows of a block: a fraction of the mean group, in whole tiles.

    Smaller blocks follow uneven groups more closely, larger ones read the matrices less often.
    """
    part = -(-num_rows // (BLOCKS * num_groups))
    tile = TILE if part > TILE // 2 else _SMALL_TILE
    return -(-part // tile) * tile


def matmul(x_MK: jax.Array, kernel: jax.Array, sizes_G: jax.Array, over: int) -> jax.Array:
    """Multiply each row by its group's matrix, in the dtype of the rows.

    Args:
        kernel: [G, D, F].
        sizes_G: int32 rows of each group, in order. The remaining rows of M have no group.
        over: the dimension of the kernel to contract: 1 (rows are [M, D]) or 2 ([M, F]).

    Returns:
        [M, F] or [M, D]; zero for rows without a group.
    """
    num_rows = len(x_MK)
    kernel = kernel.astype(x_MK.dtype)
    block = block_rows(num_rows, len(kernel))

    def run_round(number, out):
        rows_GC, is_row_GC = _rows(sizes_G, number, block)
        x_GCK = x_MK.at[rows_GC].get(mode="clip")
        y_GCN = jax.lax.dot_general(x_GCK, kernel, (((2,), (over,)), ((0,), (0,))))
        # Unused block entries go past the end, to a different index each, and are dropped.
        beyond_GC = num_rows + jnp.arange(rows_GC.size).reshape(rows_GC.shape)
        to_GC = jnp.where(is_row_GC, rows_GC, beyond_GC)
        return out.at[to_GC].set(y_GCN, mode="drop", unique_indices=True)

    zeros = jnp.zeros((num_rows, kernel.shape[3 - over]), x_MK.dtype)
    with jax.named_scope(LOOP):
        return jax.lax.fori_loop(0, _num_rounds(sizes_G, block), run_round, zeros)


def outer(x_MD: jax.Array, y_MF: jax.Array, sizes_G: jax.Array, dtype) -> jax.Array:
    """Sum the outer products of each group's rows, which is the gradient of its matrix.

    Returns:
        [G, D, F], computed and accumulated in `dtype`; zero for empty groups.
    """
    block = block_rows(len(x_MD), len(sizes_G))

    def run_round(number, total):
        rows_GC, is_row_GC = _rows(sizes_G, number, block)
        # Both factors are cleared, since other rows may hold infinities.
        x_GCD, y_GCF = (
            jnp.where(is_row_GC[..., None], part.at[rows_GC].get(mode="clip"), 0)
            for part in (x_MD, y_MF)
        )
        dims = (((1,), (1,)), ((0,), (0,)))
        return total + jax.lax.dot_general(x_GCD, y_GCF, dims, preferred_element_type=dtype)

    zeros = jnp.zeros((len(sizes_G), x_MD.shape[1], y_MF.shape[1]), dtype)
    with jax.named_scope(LOOP):
        return jax.lax.fori_loop(0, _num_rounds(sizes_G, block), run_round, zeros)


def _rows(sizes_G, number, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the row indices of each group in a round, [G, C], and which belong to the group."""
    within_C = number * block + jnp.arange(block)
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    return starts_G[:, None] + within_C, within_C < sizes_G[:, None]


def _num_rounds(sizes_G, block: int) -> jax.Array:
    return -(-sizes_G.max() // block)
