"""Tokenized conversations: as they are stored, and shifted by one as the step takes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One tokenized conversation, not shifted.

    Attributes:
        ids: int32 [n].
        weights: float32 [n], the loss weight of each token; 0 = it does not train.
        num_cut: turns left out at its start because they did not fit.
        turn_ends: ids of the special tokens that end what trains, one per turn.
    """

    ids: np.ndarray
    weights: np.ndarray
    num_cut: int = 0
    turn_ends: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, shifted: `targets[i]` is the token after `tokens[i]`.

    Attributes:
        tokens: int32 [n], model inputs.
        targets: int32 [n], next tokens.
        weights: float32 [n], of each target in the loss; 0 = it does not train.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a data set, source after source, as ranges of the sources' token arrays.

    Attributes:
        arrays: per source (ids int32 [tokens], weights [tokens], not shifted), in memory or mapped.
        source_of: uint16 [examples], the position of each example's source in `arrays`.
        starts, stops: int64 [examples], the tokens of each example.
        rows: int64 [examples], the row of its source, from 0, that each example came from.
        sources: {source name: range of examples}, in the order of `arrays`.
        report: {source name: counts}, as written to data_report.json.
    """

    arrays: Sequence[tuple[np.ndarray, np.ndarray]]
    source_of: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    rows: np.ndarray
    sources: dict[str, range]
    report: dict[str, dict]

    @classmethod
    def in_memory(cls, encoded: Mapping[str, Sequence[Encoded]]) -> "Examples":
        """Make examples of what is at hand: {source name: its examples}, one per row."""
        arrays: list[Any] = []
        lengths, rows, sources = [], [], {}
        source_of: list[int] = []
        for number, (name, found) in enumerate(encoded.items()):
            arrays.append(
                (
                    np.concatenate([one.ids for one in found], dtype=np.int32),
                    np.concatenate([one.weights for one in found], dtype=np.float32),
                )
            )
            sources[name] = range(len(source_of), len(source_of) + len(found))
            source_of += [number] * len(found)
            lengths.append(np.array([len(one.ids) for one in found], np.int64))
            rows += range(len(found))
        stops = np.concatenate([np.cumsum(of_source) for of_source in lengths])
        return cls(
            arrays=arrays,
            source_of=np.array(source_of, np.uint16),
            starts=stops - np.concatenate(lengths),
            stops=stops,
            rows=np.array(rows, np.int64),
            sources=sources,
            report={name: {} for name in sources},
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Model inputs per example, int64 [examples]: one less than its tokens."""
        return self.stops - self.starts - 1

    def encoded(self, index: int) -> Encoded:
        """Return one example as it is stored."""
        ids, weights = self.arrays[self.source_of[index]]
        part = slice(self.starts[index], self.stops[index])
        return Encoded(ids[part], weights[part])

    def __getitem__(self, index: int) -> Example:
        one = self.encoded(index)
        return Example(tokens=one.ids[:-1], targets=one.ids[1:], weights=one.weights[1:])
