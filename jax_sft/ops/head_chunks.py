"""Sizes of the token chunks in which the output head is computed, without JAX.

`cross_entropy` computes in these chunks; `planning` counts them.
"""

from typing import Any

# Chunk sizes in tokens, each half of the previous one. The logits of one chunk are in memory at a
# time. As many chunks as the trained tokens fill have the largest size. The remainder uses at most
# one of each smaller size, and the last chunk is half empty on average. Each chunk reads and writes
# the float32 gradient of the head (8 V D bytes) for 6 C V D operations of matrix products. On an
# H200 (4.8 TB/s, about 650 TFLOP/s) that takes 180 / C of their time, independent of V and D: 18%
# at 1024 if none of it is hidden, 70% at 256. On a CPU core, which is slow at products relative to
# its memory (100 GFLOP/s, 5 GB/s), it takes 27 / C.
CHUNKS = {"gpu": (1024, 512, 256), "cpu": (256, 128, 64)}
MAX_LOGITS_BYTES = 2**30  # per chunk and device; limits the size above 262,144 ids per device
MIN_CHUNK = 128  # lower bound of that limit in tokens: one tile of a matrix product


def chunk_sizes(num_ids: int, num_tokens: int, platform: str) -> tuple[int, ...]:
    """Return the chunk sizes in tokens, largest first. Each is a multiple of the next.

    Args:
        num_ids, num_tokens: vocabulary ids and tokens per device.
        platform: "gpu" or "cpu".
    """
    memory_limit = MAX_LOGITS_BYTES // (4 * num_ids) // MIN_CHUNK * MIN_CHUNK
    most = min(max(memory_limit, MIN_CHUNK), num_tokens)
    return tuple(size for size in CHUNKS[platform] if size <= most) or (most,)


def num_chunks(num_trained: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Return the number of chunks of each size that hold `num_trained` tokens.

    Less than one chunk of the smallest size is left empty.

    Args:
        num_trained: an int, or an int array without dimensions, for which the results are arrays.
    """
    left = -(-num_trained // sizes[-1]) * sizes[-1]
    counts = []
    for size in sizes:
        counts.append(left // size)
        left = left % size
    return counts
