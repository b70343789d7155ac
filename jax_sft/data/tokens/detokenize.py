"""Decode ids as text for display, in a confined process, since decoders are untrusted code.

Called by `inspect`, and by `train` for eval.samples.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_sft.data.tokens import worker
from jax_sft.report import data_page
from jax_sft.runtime import confined
from jax_sft.runtime.confined import Ended, Stage

_numbers = itertools.count()


class Detokenizer:
    """Decodes with the tokenizer of a model folder.

    Raises:
        ValueError: the tokenizer cannot be loaded.
        confined.OutOfBounds: a program of the tokenizer exceeded its limits.
    """

    def __init__(self, folder: Path):
        self._key = folder, next(_numbers)
        self.size: int = self._call(_size)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""
        return self._call(_decode, list(map(int, ids)))

    def pieces(self, ids: Sequence[int], weights: Sequence[float]) -> list[data_page.Piece]:
        """See `data_page.pieces`."""
        return self._call(_pieces, list(ids), list(weights))

    def _call(self, function: Callable, *args: Any) -> Any:
        with confined.borrowed() as process:
            try:
                return process.call(function, self._key, *args)
            except Ended as error:
                raise worker.explained(error, self._key[0]) from error


# ---- in the confined process --------------------------------------------------------------------

_loaded: dict[tuple[Path, int], Any] = {}  # only the tokenizer that was used last


def _tokenizer(key: tuple[Path, int]) -> Any:
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = worker.load_tokenizer(key[0])
    confined.at(Stage.DECODING)
    return _loaded[key]


def _size(key: tuple[Path, int]) -> int:
    return len(_tokenizer(key))


def _decode(key: tuple[Path, int], ids: list[int]) -> str:
    with confined.library_errors(f"the tokenizer of {key[0]} fails to decode"):
        return _tokenizer(key).decode(ids)


def _pieces(key: tuple[Path, int], ids: list[int], weights: list[float]) -> list[data_page.Piece]:
    confined.allow(len(ids) / 1e4)
    with confined.library_errors(f"the tokenizer of {key[0]} fails to decode"):
        return data_page.pieces(_tokenizer(key), ids, weights)
