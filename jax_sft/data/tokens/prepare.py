"""Prepare examples of at most `data.seq_len` tokens, and report what became of every row.

Called by `train` and `inspect` before any weight is read. The tokens come from `cache` and stay on
disk; this module decides which ranges of them are used.
"""

import dataclasses
import hashlib
import itertools
import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_sft.data.batches.examples import Examples
from jax_sft.data.chat import chat_templates, encoding
from jax_sft.data.tokens import cache, losses
from jax_sft.settings import Data, Source

PERCENTILES = (5, 50, 95, 99)
NUM_LONGEST = 5  # longest examples named in the report
NUM_BAD = 5  # bad rows quoted in the report


def prepare(
    sources: Mapping[str, Source],
    tokenizer_folder: Path,
    data: Data,
    *,
    progress: bool = True,
    stop_at_bad_row: bool | None = None,
) -> Examples:
    """Tokenize every source or reuse its cached tokens, in order of name and row.

    Args:
        sources: {name: source}.
        tokenizer_folder: a local folder, with the chat template.
        progress: show bars.
        stop_at_bad_row: raise at the first bad row; None = as `data.on_bad_row` says.

    Returns:
        Examples of 1 to `data.seq_len` inputs, each with at least one trained target.

    Raises:
        ValueError: a bad or overlong row where `data` says to raise, naming source, file and line;
            a source that cannot be read; losses over `data.max_lost`; or no example left.
        RuntimeError: a process that tokenizes died.
    """
    stops = data.on_bad_row == "raise" if stop_at_bad_row is None else stop_at_bad_row
    stores: list[cache.Store] = []
    fitted: list[Fitted] = []
    report: dict[str, dict] = {}
    for name in sorted(sources):
        started = time.monotonic()
        store = cache.open_or_build(
            sources[name],
            tokenizer_folder,
            options(data),
            data.cache_dir,
            data.num_workers,
            stop_at_bad_row=stops,
            progress=progress,
            name=name,
            cache_gb=data.cache_gb,
            max_row_bytes=data.max_row_bytes,
        )
        fit = fit_length(store, data.seq_len, data.overlong, name)
        stores.append(store)
        fitted.append(fit)
        report[name] = {
            "path": sources[name].path,
            **describe(store, fit, data),
            "fingerprint": _hash(store.meta["content"], fit.kept, fit.stops),
            "cached": store.cached,
            "seconds": round(time.monotonic() - started, 3),
        }
    if not any(len(fit.kept) for fit in fitted):
        raise ValueError(
            f"no example is left to use (data.seq_len = {data.seq_len}):\n{table(report)}"
        )
    if problems := losses.problems(report, data.max_lost):
        raise ValueError("\n".join(problems))
    return _join(stores, fitted, report)


def is_cached(data: Data, tokenizer_folder: Path, *, progress: bool = True) -> bool:
    """Whether no source and no eval set seems to need tokenizing."""
    sources = [*data.train.values(), *data.eval.values()]
    return all(
        cache.is_built(
            *(source, tokenizer_folder, options(data), data.cache_dir),
            progress=progress,
            max_row_bytes=data.max_row_bytes,
        )
        for source in sources
    )


def options(data: Data) -> encoding.Options:
    """Return the options of the data settings that decide which tokens are trained."""
    return encoding.Options(
        turns=data.turns,
        train_empty_think=data.train_empty_think,
        template_args=dict(data.template_args),
        date=data.date,
        max_tokens=data.seq_len + 1 if data.overlong == "truncate_history" else 0,
        chat_template=chat_templates.read(data.chat_template),
    )


def fingerprint(examples: Examples) -> str:
    """Return a hash of the examples alone, not of their files.

    Moved files and a newer version of this package do not change it unless a token changes.
    """
    hashes = [[name, examples.report[name]["fingerprint"]] for name in examples.sources]
    return _hash(json.dumps(hashes))


def _hash(text: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array.astype("<i8")).data)
    return digest.hexdigest()


def _join(
    stores: Sequence[cache.Store], fitted: Sequence["Fitted"], report: dict[str, dict]
) -> Examples:
    counts = [len(fit.kept) for fit in fitted]
    bounds = [0, *itertools.accumulate(counts)]
    pairs = list(zip(stores, fitted, strict=True))
    return Examples(
        arrays=[(store.ids, store.weights) for store in stores],
        source_of=np.repeat(np.arange(len(stores), dtype=np.uint16), counts),
        starts=np.concatenate([store.starts[fit.kept] for store, fit in pairs]),
        stops=np.concatenate([fit.stops for fit in fitted]),
        rows=np.concatenate([store.rows[fit.kept] for store, fit in pairs]),
        sources={
            name: range(*part)
            for name, part in zip(report, itertools.pairwise(bounds), strict=True)
        },
        report=report,
    )


# ---- lengths ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The examples of a store that are used, and how much of each.

    Attributes:
        kept: int64 [kept], positions in the store, ascending.
        stops: int64 [kept], their ends in the store's tokens after cutting.
        trained: int64 [kept], number of trained targets.
        num_cut: kept examples that end earlier than in the store.
        num_overlong: examples dropped for their length.
        num_untrained: examples dropped for having no trained target.
    """

    kept: np.ndarray
    stops: np.ndarray
    trained: np.ndarray
    num_cut: int
    num_overlong: int
    num_untrained: int


def fit_length(store: cache.Store, seq_len: int, overlong: str, name: str = "") -> Fitted:
    """Choose the examples of at most `seq_len` inputs that have a trained target.

    Args:
        overlong: treatment of an example of more inputs, that is of more than seq_len + 1 tokens.
            "raise"; "drop"; "truncate": cut it after the last whole run of trained tokens that
            fits, so that no answer loses its end (plain text, which has no turns, is cut at
            seq_len), and drop it if none fits; "truncate_history": drop it if it is too long even
            without its oldest turns.
        name: of the source, in messages.

    Raises:
        ValueError: an example is too long under "raise".
    """
    stops, trained = store.stops.copy(), store.trained.astype(np.int64)
    too_long = np.flatnonzero(stops - store.starts - 1 > seq_len)
    if overlong == "raise" and len(too_long):
        first = int(too_long[0])
        raise ValueError(
            f"{store.where(first)} (source {name!r}): {stops[first] - store.starts[first] - 1} "
            f"tokens do not fit data.seq_len = {seq_len} (the first of {len(too_long)} examples): "
            'raise it, or set data.overlong to "drop", "truncate" or "truncate_history"'
        )
    if overlong == "truncate":
        for i in too_long:
            start, most = store.starts[i], store.starts[i] + seq_len + 1
            if store.meta["format"] == "text":
                stops[i] = most
            else:
                stops[i] = _end_of_last_run(store.weights, start, most) or stops[i]
            trained[i] = np.count_nonzero(store.weights[start + 1 : stops[i]])
    fits = stops - store.starts - 1 <= seq_len
    kept = np.flatnonzero(fits & (trained > 0))
    return Fitted(
        kept=kept,
        stops=stops[kept],
        trained=trained[kept],
        num_cut=int(np.count_nonzero(stops[kept] < store.stops[kept])),
        num_overlong=int(np.count_nonzero(~fits)),
        num_untrained=int(np.count_nonzero(fits & (trained == 0))),
    )


def _end_of_last_run(weights: np.ndarray, start: int, most: int) -> int | None:
    """Return the end of the last run of trained tokens that ends at or before `most`, or None.

    The example continues after `most`, so the next token shows whether a run ends there.
    """
    trains = weights[start : most + 1] != 0
    ends = np.flatnonzero(trains[:-1] & ~trains[1:]) + 1
    # A run of only the first token does not count: that token is never a target.
    return int(start + ends[-1]) if len(ends) and ends[-1] > 1 else None


# ---- report -------------------------------------------------------------------------------------


def describe(store: cache.Store, fit: Fitted, data: Data) -> dict:
    """Count what became of the rows of a source, as plain JSON.

    Lengths and tokens are model inputs, one less than the tokens stored. `lengths` and `longest`
    describe the examples before `data.overlong`, but without the turns that "truncate_history" left
    out. These turns are in `truncated` and `turns_left_out`, and in no other count but `left_out`,
    the shares.

    Args:
    """
    lengths = store.stops - store.starts - 1
    history_cut = store.num_cut[fit.kept] > 0
    shorter = fit.stops < store.stops[fit.kept]
    num_bad = sum(store.meta["refused"].values())
    counts = {
        "files": [file["name"] for file in store.meta["files"]],
        "format": store.meta["format"],
        "format_reason": store.meta["format_reason"],
        "rows": store.meta["rows"],
        "kept": len(fit.kept),
        "rows_kept": len(_examples_per_row(store.rows[fit.kept])),
        "split": int(np.count_nonzero(_examples_per_row(store.rows) > 1)),
        "dropped": {
            "overlong": fit.num_overlong,
            "no_trained_token": fit.num_untrained,
            "bad_row": num_bad,
        },
        "truncated": int(np.count_nonzero(history_cut | shorter)),
        "turns_left_out": int(store.num_cut[fit.kept].sum()),
        "tokens": int((fit.stops - store.starts[fit.kept] - 1).sum()),
        "trained_tokens": int(fit.trained.sum()),
        "lost_trained_tokens": int(store.trained.sum(dtype=np.int64) - fit.trained.sum()),
        "highest_id": store.meta["highest_id"],
        "turn_ends": store.meta["turn_ends"],
        "lengths": percentiles(lengths),
        "longest": [
            {"row": int(store.rows[i]), "where": store.where(i), "tokens": int(lengths[i])}
            for i in _longest(lengths, NUM_LONGEST)
        ],
        "bad_row_reasons": store.meta["refused"],
        "bad_rows": list(itertools.islice(store.errors(), NUM_BAD)),
    }
    num_lost = losses.turns_lost(store.rows[fit.kept], store.num_cut[fit.kept])
    counts["left_out"] = losses.shares(counts, sum(counts["turn_ends"].values()), num_lost)

    def with_truncate() -> int:
        return int(fit_length(store, data.seq_len, "truncate").trained.sum())

    return counts | {"cures": losses.cures(counts, data.overlong, with_truncate)}


def _examples_per_row(rows: np.ndarray) -> np.ndarray:
    """Count the examples of each row that has any, from the ascending rows of the examples."""
    starts = np.flatnonzero(rows[1:] != rows[:-1]) + 1
    return np.diff(np.concatenate([[0], starts, [len(rows)]])) if len(rows) else rows


def _longest(lengths: np.ndarray, number: int) -> list[int]:
    """Return the positions of the longest, ties in order, without sorting all of them."""
    number = min(number, len(lengths))
    if not number:
        return []
    candidates = np.flatnonzero(lengths >= np.partition(lengths, -number)[-number])
    return candidates[np.argsort(-lengths[candidates], kind="stable")][:number].tolist()


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Return p5 to p99 and the maximum, each a length that occurs; {} if there are no lengths.

    The p-th percentile is the smallest length that at least p percent do not exceed.
    """
    if not len(lengths):
        return {}
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    named = {f"p{p}": int(length) for p, length in zip(PERCENTILES, values, strict=True)}
    return named | {"max": int(lengths.max())}


def table(report: Mapping[str, dict]) -> str:
    """Format reports for a screen of 100 columns: a line per source, then notes on each."""
    head = ["source", "format", "rows", "examples", "tokens", "trained", "cut", "p50", "p95", "max"]
    lines = [head]
    for name, counts in report.items():
        lengths = counts["lengths"]
        numbers = [counts[key] for key in ("rows", "kept", "tokens", "trained_tokens", "truncated")]
        numbers += [lengths.get(key, 0) for key in ("p50", "p95", "max")]
        lines.append([_clip(name, 20), counts["format"], *map(_short, numbers)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for cells in lines:
        named = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        counted = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        shown.append("  ".join(named + counted))
    for name, counts in report.items():
        for note in _notes(counts):
            shown += textwrap.wrap(
                f"{name}: {note}", 100, subsequent_indent="    ", max_lines=3, placeholder=" ..."
            )
    return "\n".join(shown)


def _notes(counts: dict) -> list[str]:
    """Return what the columns of the table do not show."""
    notes = []
    if counts["format_reason"]:
        notes.append(f"read as {counts['format']}: {counts['format_reason']}")
    if dropped := {reason: count for reason, count in counts["dropped"].items() if count}:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        notes.append(f"dropped {listed}")
    if counts["lost_trained_tokens"]:
        notes.append(f"{counts['lost_trained_tokens']:,} trained tokens cut off or dropped")
    if counts["split"]:
        notes.append(f"{counts['split']:,} rows became several examples each")
    if counts["turns_left_out"]:
        notes.append(
            f"{counts['turns_left_out']:,} turns left out at the start of conversations that were "
            "too long; what would have trained in them is in no other count"
        )
    reasons = list(counts["bad_row_reasons"].items())
    notes += [f"{count:,} bad rows: {reason}" for reason, count in reasons[:NUM_BAD]]
    notes += [f"first bad row: {bad['where']}: {bad['error']}" for bad in counts["bad_rows"][:1]]
    return notes


def _short(number: int) -> str:
    """Format a number as 12,345 or 1.23M, in at most seven characters."""
    if number < 1_000_000:
        return f"{number:,}"
    value, units = number / 1e6, iter("MBT")
    unit = next(units)
    while value >= 999.995 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.2f}{unit}"


def _clip(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
