"""Sizes of the chunks of tokens in which the head multiplies, without JAX.

`cross_entropy` computes in them; `planning` counts them.
"""

from typing import Any

# Tokens whose logits live at a time on a device, each size half of the one before: as many of the
# largest as the trained tokens fill, then at most one of each other, the last one half empty on
# average. Each chunk reads and writes the float32 gradient of the head, 8 V D bytes, beside 6 C V D
# operations of its matrix products. On an H200 (4.8 TB/s, about 650 TFLOP/s) that is 180 / C of
# their time, whatever V and D are: 18% at 1024 if nothing of it is hidden, 70% at 256. A CPU core
# multiplies slowly beside its memory (100 GFLOP/s, 5 GB/s): 27 / C.
CHUNKS = {"gpu": (1024, 512, 256), "cpu": (256, 128, 64)}
MAX_LOGITS_BYTES = 2**30  # of a chunk on a device: binds above 262,144 ids per device
MIN_CHUNK = 128  # tokens that it leaves; one tile of a matrix product


def chunk_sizes(num_ids: int, num_tokens: int, platform: str) -> tuple[int, ...]:
    """Tokens per chunk on a "gpu" or "cpu" that has so many tokens and ids of the vocabulary.

    The largest size first; each is a multiple of the next.
    """
    of_memory = MAX_LOGITS_BYTES // (4 * num_ids) // MIN_CHUNK * MIN_CHUNK
    most = min(max(of_memory, MIN_CHUNK), num_tokens)
    return tuple(size for size in CHUNKS[platform] if size <= most) or (most,)


def num_chunks(num_trained: Any, sizes: tuple[int, ...]) -> list[Any]:
    """How many chunks of each size hold so many tokens: less than one of the smallest is empty.

    Args:
        num_trained: an int, or an int array of no dimensions; then the results are arrays too.
    """
    left = -(-num_trained // sizes[-1]) * sizes[-1]
    counts = []
    for size in sizes:
        counts.append(left // size)
        left = left % size
    return counts
