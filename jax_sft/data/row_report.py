"""Report what became of every row: the trained examples, and all that was refused or dropped.

Called by `inspect`. A row that training would refuse does not stop it: the row is listed.
"""

import dataclasses
import heapq
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft import models
from jax_sft.data.tokens import cache, losses, prepare
from jax_sft.runtime import confined
from jax_sft.runtime.text import numbered
from jax_sft.settings import Data
from jax_sft.weights import hf_folder
from jax_sft.weights.hf_config import size

EVAL = "eval/"  # prefix of the names of eval sets


@dataclasses.dataclass(frozen=True)
class Entry:
    """A trained example or, with an error, something that was refused or dropped.

    Attributes:
        row: of the source, from 0.
        where: "FILE, line 12".
        ids, weights: not shifted.
        num_left_out: turns left out at its start.
        num_cut: tokens cut off at its end.
    """

    row: int
    where: str
    error: str
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    weights: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    num_left_out: int = 0
    num_cut: int = 0

    @property
    def target_weights(self) -> np.ndarray:
        """The weights, with 0 for the first token, which nothing predicts."""
        return np.where(np.arange(len(self.weights)) > 0, self.weights, 0)

    def describe(self) -> str:
        """Return the length of the example and how it was truncated."""
        parts = [f"{len(self.ids):,} tokens, {np.count_nonzero(self.target_weights):,} train"]
        if self.num_left_out:
            parts.append(f"truncated: {self.num_left_out} turns left out at the start")
        if self.num_cut:
            parts.append(f"truncated: {self.num_cut:,} tokens cut off at the end")
        return "; ".join(parts)

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the object that --dump writes."""
        if self.error:
            return {"source": name, "row": self.row, "error": self.error}
        if np.all(self.weights == np.floor(self.weights)):
            mask = self.weights.astype(np.int64).tolist()
        else:  # str keeps the given decimals: 0.3, not 0.30000001192092896
            mask = [int(w) if w == int(w) else float(str(w)) for w in self.weights]
        fields = {"source": name, "row": self.row, "ids": self.ids.tolist(), "mask": mask}
        return fields | ({"truncated": True} if self.num_left_out or self.num_cut else {})


@dataclasses.dataclass(frozen=True)
class Source:
    """One source as it would be trained.

    Attributes:
        name: NAME of a train source, eval/NAME of an eval set.
        fit: which of the store's examples are used, and how much of each.
        seq_len: the limit that they were fitted to.
        report: what became of its rows.
    """

    name: str
    store: cache.Store
    fit: prepare.Fitted
    seq_len: int
    report: dict

    def example(self, index: int) -> Entry:
        """Return one of the used examples."""
        store, position = self.store, int(self.fit.kept[index])
        start, stop = int(store.starts[position]), int(self.fit.stops[index])
        return Entry(
            *(int(store.rows[position]), store.where(position), ""),
            ids=store.ids[start:stop],
            weights=store.weights[start:stop],
            num_left_out=int(store.num_cut[position]),
            num_cut=int(store.stops[position]) - stop,
        )

    def bad_rows(self) -> Iterator[Entry]:
        """Yield the rows that cannot be used, in order."""
        for bad in self.store.errors():
            yield Entry(bad["row"], bad["where"], bad["error"])

    def dropped(self) -> Iterator[Entry]:
        """Yield the examples dropped for their length or without a trained token, in order."""
        store = self.store
        is_dropped = np.ones(len(store.rows), bool)
        is_dropped[self.fit.kept] = False
        for position in np.flatnonzero(is_dropped).tolist():
            num_inputs = int(store.stops[position] - store.starts[position]) - 1
            if num_inputs > self.seq_len:
                reason = f"overlong: {num_inputs} tokens do not fit data.seq_len = {self.seq_len}"
            else:
                reason = "no_trained_token: none of its tokens trains"
            yield Entry(int(store.rows[position]), store.where(position), reason)

    def left_out(self) -> Iterator[Entry]:
        """Yield everything that is not trained, in the order of rows."""
        return heapq.merge(self.bad_rows(), self.dropped(), key=lambda entry: entry.row)

    def row_entries(self, row: int) -> list[Entry]:
        """Return what became of one row: its examples, and its parts that were left out."""
        first, stop = np.searchsorted(self.store.rows[self.fit.kept], [row, row + 1]).tolist()
        used = [self.example(index) for index in range(first, stop)]
        return used + [entry for entry in self.left_out() if entry.row == row]

    def entries(self) -> Iterator[Entry]:
        """Yield every example and everything that was left out, in the order of rows."""
        used = map(self.example, range(len(self.fit.kept)))
        return heapq.merge(used, self.left_out(), key=lambda entry: entry.row)


def lenient(data: Data) -> Data:
    """Return a copy of the settings that skips and counts what training would refuse."""
    overlong = "drop" if data.overlong == "raise" else data.overlong
    return dataclasses.replace(data, on_bad_row="skip", max_lost=1.0, overlong=overlong)


def open_sources(data: Data, folder: Path) -> list[Source]:
    """Tokenize the train sources and the eval sets, or reuse their cached tokens.

    Args:

    Raises:
        ValueError: names all sources that cannot be read at all.
    """
    data, opened, problems = lenient(data), [], []
    options = prepare.options(data)
    named = {name: data.train[name] for name in sorted(data.train)}
    named |= {EVAL + name: data.eval[name] for name in sorted(data.eval)}
    for name, source in named.items():
        try:
            store = cache.open_or_build(
                *(source, folder, options, data.cache_dir, data.num_workers),
                stop_at_bad_row=False,
                progress=sys.stderr.isatty(),
                name=name,
                cache_gb=data.cache_gb,
                max_row_bytes=data.max_row_bytes,
            )
        except confined.OutOfBounds:  # the other sources would only take as long to fail
            raise
        except ValueError as error:
            problems.append(str(error))
            continue
        fit = prepare.fit_length(store, data.seq_len, data.overlong, name)
        report = {"path": source.path} | prepare.describe(store, fit, data)
        opened.append(Source(name, store, fit, data.seq_len, report))
    if problems:
        raise ValueError(numbered("{} source(s) cannot be read", problems))
    return opened


def refusals(data: Data, sources: Sequence[Source], vocab: int) -> list[str]:
    """Return what training would refuse of each source.

    Problems of the training set as a whole are not reported.

    Args:
        vocab: number of token ids.
    """
    messages = []
    for source in sources:
        dropped, name, highest = source.report["dropped"], source.name, source.report["highest_id"]
        if dropped["bad_row"] and data.on_bad_row == "raise":
            messages.append(
                f'{dropped["bad_row"]:,} bad row(s) of {name} (data.on_bad_row = "raise")'
            )
        if dropped["overlong"] and data.overlong == "raise":
            messages.append(
                f"{dropped['overlong']:,} example(s) of {name} over data.seq_len = {data.seq_len} "
                '(data.overlong = "raise")'
            )
        if not is_stopped(data, source):
            lost = losses.problems({name: source.report}, data.max_lost)
            messages += [f"to start: {problem}" for problem in lost]
        if name.startswith(EVAL) and not len(source.fit.kept):
            messages.append(f"to start: data.eval.{name.removeprefix(EVAL)} has no example left")
        if highest >= vocab:
            messages.append(
                f"{name}: its highest token id is {highest}, and there are only {vocab}: tokens of "
                "another model, or added without resizing the embedding"
            )
    return messages


def vocabulary(folder: Path, num_tokens: int) -> int:
    """Return the model's number of token ids, or the tokenizer's if config.json has none.

    Raises:
        ValueError: training would refuse the config.json.
    """
    file = folder / "config.json"
    config = hf_folder.read_json(file) if file.is_file() else {}
    if "model_type" in config:
        return models.read(config)[1].vocab
    return size("vocab_size", config["vocab_size"]) if "vocab_size" in config else num_tokens


def is_stopped(data: Data, source: Source) -> bool:
    """Whether training stops at a row of a source, so that it leaves nothing out."""
    dropped = source.report["dropped"]
    return bool(
        (dropped["bad_row"] and data.on_bad_row == "raise")
        or (dropped["overlong"] and data.overlong == "raise")
    )


def warnings(data: Data, sources: Sequence[Source]) -> list[str]:
    """Return the losses of the train sources and of each eval set, as training prints them."""
    running = {s.name: s.report for s in sources if not is_stopped(data, s)}
    train = {name: report for name, report in running.items() if not name.startswith(EVAL)}
    sets = [train, *({n: r} for n, r in running.items() if n.startswith(EVAL))]
    return [line for reports in sets for line in losses.warnings(reports)]


def verdict(data: Data, sources: Sequence[Source], refused: Sequence[str]) -> list[str]:
    """Return the last lines: what would be left out, and whether training would start."""
    lines = []
    for source in sources:
        chosen = dict(source.report["dropped"])
        for reason, treatment in (("bad_row", data.on_bad_row), ("overlong", data.overlong)):
            if treatment == "raise":
                del chosen[reason]
        if any(chosen.values()):
            counted = ", ".join(f"{count:,} {reason}" for reason, count in chosen.items() if count)
            lines.append(f"training would leave out of {source.name}: {counted}")
    lines += [f"WARNING {line}" for line in warnings(data, sources)]
    lines += [f"training would refuse {reason}" for reason in refused]
    return lines if refused else [*lines, "training would refuse nothing"]
