"""Choose the examples of each epoch of a run, and the order in which the sources give them.

- Without weights a source gives round(epochs x its size) examples per epoch of the run, by default
  each of its examples once.
- With weights, the sources' shares of the examples (not of the tokens) are weight / sum of weights.
  The epoch is as long as possible without a repetition: it ends where the first source is used up,
  and the other shares are rounded down.
- A source is an endless stream of passes over its examples. Each pass has a new order, given by
  the seed, the source's name and the number of the pass; without shuffling the order is always
  that of the file. An epoch takes the next examples of the stream. So the examples that one epoch
  leaves out come first in the next, and a source that is used up starts over in a new order.
- If a pass begins within an epoch and does not end in it, the examples of the previous pass that
  this epoch already has come last in the new pass. So within one epoch the numbers of uses of any
  two examples of a source differ by at most one; with weights no example is used twice.

Everything is a pure function of its arguments. Called by `loader` and `validate`.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from jax_sft.settings import Source


def problems(sources: Mapping[str, Source]) -> list[str]:
    """Return the problems with `weight` and `epochs` of the sources under data.train."""
    messages = []
    for name, source in sources.items():
        if not (math.isfinite(source.weight) and source.weight >= 0):
            messages.append(
                f"data.train.{name}.weight = {source.weight} must be a number above 0, "
                "or 0 for a source without weight"
            )
        if not (math.isfinite(source.epochs) and source.epochs > 0):
            messages.append(
                f"data.train.{name}.epochs = {source.epochs} must be a number above 0: "
                "leave out a source that is not to train"
            )
        elif source.weight and source.epochs != 1:
            messages.append(
                f"data.train.{name}.weight = {source.weight} and data.train.{name}.epochs = "
                f"{source.epochs} contradict each other: set one of them"
            )
    weighted = [name for name in sources if sources[name].weight]
    if weighted and len(weighted) < len(sources):
        missing = ", ".join(f"data.train.{name}.weight" for name in sources if name not in weighted)
        messages.append(
            f"only some sources have a weight ({', '.join(weighted)}): set {missing} too, or none"
        )
    return messages


def counts(sizes: Mapping[str, int], sources: Mapping[str, Source] | None) -> dict[str, int]:
    """Return the number of examples that each source gives in every epoch of the run.

    The fractions are exact in the decimals of the config: weights 0.1 and 0.3 are 1 : 3.

    Args:
        sizes: {source name: its number of examples}.
        sources: {name: source}; None = every example once.

    Raises:
        ValueError: see `problems`; or a source gives no example.
    """
    if sources is None:
        return dict(sizes)
    if wrong := problems(sources):
        raise ValueError("; ".join(wrong))
    weights = {name: Fraction(str(sources[name].weight)) for name in sizes}
    if any(weights.values()):
        length = min(size / weights[name] for name, size in sizes.items())  # per unit of weight
        examples_per_epoch = {name: math.floor(weights[name] * length) for name in sizes}
    else:
        examples_per_epoch = {
            name: round(Fraction(str(sources[name].epochs)) * sizes[name]) for name in sizes
        }
    for name, count in examples_per_epoch.items():
        if count == 0:
            key = "weight" if weights[name] else "epochs"
            value = getattr(sources[name], key)
            raise ValueError(
                f"data.train.{name} has {sizes[name]} examples and gives none of them per epoch "
                f"(data.train.{name}.{key} = {value}, examples of all sources: "
                f"{dict(sizes)}): raise its {key}, or leave the source out"
            )
    return examples_per_epoch


def same_every_epoch(ranges: Mapping[str, range], counts: Mapping[str, int]) -> bool:
    """Whether all epochs hold the same examples, each equally often."""
    return all(counts[name] % len(ranges[name]) == 0 for name in ranges if ranges[name])


def example_ids(
    ranges: Mapping[str, range],
    counts: Mapping[str, int],
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """Return the examples of one epoch, source after source, int64 [sum of counts].

    Args:
        ranges: {source name: its example ids}.
        counts: {source name: examples in every epoch}, from `counts`.
    """
    parts = [
        ids.start + _source_ids(len(ids), counts[name], name, shuffle, seed, epoch)
        for name, ids in ranges.items()
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _source_ids(size: int, count: int, name: str, shuffle, seed: int, epoch: int) -> np.ndarray:
    """Return the examples, from 0, that a source of `size` examples gives in an epoch.

    The rest of a pass depends on the previous epochs, back to the last one that began with a new
    pass. The loop replays those epochs.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    start = next(e for e in range(epoch, -1, -1) if e * count % size == 0)
    number = start * count // size  # number of the next pass
    left = np.zeros(0, np.int64)  # rest of the previous pass, in order
    parts = []
    for _ in range(start, epoch + 1):
        parts, left = [left[:count]], left[count:]
        missing = count - len(parts[0])
        while missing:
            ids = _one_pass(size, name, shuffle, seed, number)
            number += 1
            if missing < size:
                is_had = np.zeros(size, bool)
                is_had[parts[0]] = True
                ids = np.concatenate([ids[~is_had[ids]], ids[is_had[ids]]])
            parts.append(ids[:missing])
            left = ids[missing:]
            missing -= len(parts[-1])
    return np.concatenate(parts)


def _one_pass(size: int, name: str, shuffle, seed: int, number: int) -> np.ndarray:
    if not shuffle:
        return np.arange(size)
    # crc32, since Python's own hash of a string differs between processes.
    return np.random.default_rng([seed, zlib.crc32(name.encode()), number]).permutation(size)
