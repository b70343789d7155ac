"""Compute the shares of a source that would not be trained, and what would keep them.

Called by `prepare` for every source, whose report holds the shares. `train` and `inspect` show the
same sentences.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

WARNED = 0.01  # share above which a line with the cures is shown
MULTIPLE = 64  # a proposed data.seq_len is a multiple, since meshes split it


def shares(counts: Mapping[str, Any], num_turns: int, num_turns_lost: int) -> dict[str, float]:
    """Return the shares of a source that are left out.

    Args:
        counts: the report of the source.
        num_turns: trained turns.
        num_turns_lost: turns left out at the start of conversations ("truncate_history").
    """
    tokens = counts["trained_tokens"] + counts["lost_trained_tokens"]
    return {
        "rows": _share(counts["rows"] - counts["rows_kept"], counts["rows"]),
        "trained_tokens": _share(counts["lost_trained_tokens"], tokens),
        "turns": _share(num_turns_lost, num_turns + num_turns_lost),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def cures(counts: Mapping[str, Any], overlong: str, with_truncate: Callable[[], int]) -> list[str]:
    """Return what would keep the data that are left out, with the numbers of this source.

    Args:
        with_truncate: () -> the trained tokens that data.overlong = "truncate" would keep.
    """
    if max(counts["left_out"].values()) <= WARNED:
        return []
    messages, dropped = [], counts["dropped"]
    if dropped["overlong"] or (counts["lost_trained_tokens"] and counts["truncated"]):
        longest = -(-counts["lengths"]["max"] // MULTIPLE) * MULTIPLE
        messages.append(f"data.seq_len = {longest} would keep all that is too long")
        kept = with_truncate() if overlong == "drop" else 0
        if kept > counts["trained_tokens"]:
            whole = counts["trained_tokens"] + counts["lost_trained_tokens"]
            messages.append(f'data.overlong = "truncate" {kept / whole:.1%} of the trained tokens')
    elif counts["turns_left_out"]:
        messages.append("a larger data.seq_len would leave out fewer turns")
    if dropped["bad_row"]:
        messages.append(
            f"{dropped['bad_row']:,} rows cannot be used as they are: inspect lists them"
        )
    if dropped["no_trained_token"]:
        messages.append(
            f"{dropped['no_trained_token']:,} examples have no token that trains: see data.turns, "
            "and train and weight of their messages"
        )
    return messages


def warnings(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line per source that loses more than WARNED, and a total over several sources.

    Args:
        report: {source: its report}, of train sources or of one eval set.
    """
    lossy = [name for name, counts in report.items() if max(counts["left_out"].values()) > WARNED]
    lines = [describe(name, report[name]) for name in lossy]
    if lossy and len(report) > 1:
        rows, kept, tokens, lost = (
            sum(counts[key] for counts in report.values())
            for key in ("rows", "rows_kept", "trained_tokens", "lost_trained_tokens")
        )
        lines.append(
            f"in all, {_share(rows - kept, rows):.1%} of the rows and "
            f"{_share(lost, tokens + lost):.1%} of the trained tokens are left out"
        )
    return lines


def describe(name: str, counts: Mapping[str, Any]) -> str:
    """Return one line with the losses of a source and their cures."""
    left_out, lost = counts["left_out"], counts["rows"] - counts["rows_kept"]
    parts = []
    if left_out["rows"]:
        parts.append(f"{left_out['rows']:.1%} of its rows ({lost:,} of {counts['rows']:,})")
    if left_out["trained_tokens"]:
        parts.append(f"{left_out['trained_tokens']:.1%} of its trained tokens")
    if left_out["turns"]:
        parts.append(f"{left_out['turns']:.1%} of its turns")
    return f"{name} leaves out {' and '.join(parts)}: {'; '.join(counts['cures'])}"


def problems(report: Mapping[str, Mapping[str, Any]], most: float) -> list[str]:
    """Return why training refuses the sources that lose more than `data.max_lost`."""
    return [
        f"{describe(name, counts)}. That is over data.max_lost = {most}: set it to 1.0 to train on "
        "the rest"
        for name, counts in report.items()
        if max(counts["left_out"].values()) > most
    ]


def turns_lost(rows: np.ndarray, num_cut: np.ndarray) -> int:
    """Count the turns left out at the start of rows that became one example.

    Args:
        rows: [examples], ascending.
        num_cut: [examples]. In a row of several examples, the turns that one of them leaves out are
            trained in another.
    """
    if not len(rows):
        return 0
    other = np.concatenate([[True], rows[1:] != rows[:-1], [True]])
    return int(num_cut[other[:-1] & other[1:]].sum())
