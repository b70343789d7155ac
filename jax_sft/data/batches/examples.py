"""Tokenized conversations: as they are stored, and shifted by one for the training step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One tokenized conversation, not shifted.

    Attributes:
        ids: int32 [n].
        weights: float32 [n], the loss weight of each token; 0 = not trained.
        num_cut: turns left out at its start because they did not fit.
        turn_ends: ids of the special tokens that end the trained text, one per turn.
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
        weights: float32 [n], the loss weight of each target; 0 = not trained.
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
        rows: int64 [examples], the row of the source that each example came from, from 0.
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
        """Make examples from {source name: its tokenized examples}, one example per row."""
        arrays: list[Any] = []
        lengths, rows, sources = [], [], {}
        source_of: list[int] = []
        for number, (name, examples) in enumerate(encoded.items()):
            arrays.append(
                (
                    np.concatenate([example.ids for example in examples], dtype=np.int32),
                    np.concatenate([example.weights for example in examples], dtype=np.float32),
                )
            )
            sources[name] = range(len(source_of), len(source_of) + len(examples))
            source_of += [number] * len(examples)
            lengths.append(np.array([len(example.ids) for example in examples], np.int64))
            rows += range(len(examples))
        stops = np.concatenate([np.cumsum(source_lengths) for source_lengths in lengths])
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
        encoded = self.encoded(index)
        return Example(
            tokens=encoded.ids[:-1], targets=encoded.ids[1:], weights=encoded.weights[1:]
        )
