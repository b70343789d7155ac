"""Format results of scripts/bench.py as tables: one block per case and machine, between markers.

The input is records (dicts as bench.py writes them, one JSON object per line), the output is text.
Subjects are compared only where they did the same work; where they did not, the table says so.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

# Largest relative difference of losses between subjects that did the same work. Float32: the order
# of sums differs; TRL and our trainer differ by at most 5e-6 in cases a and b. bfloat16: rounding.
BEFORE_TOLERANCE = {"float32": 5e-5, "bfloat16": 5e-3}
AFTER_TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}
REFERENCE = "ours"


@dataclasses.dataclass(frozen=True)
class Header:
    """Description of a case and its machine.

    Attributes:
        case: name of the case.
        title: description of the work.
        machine: description of the hardware; together with the case it is the key of the block.
        when: date and commit of our code.
        dtype: dtype of the arithmetic; decides the tolerances.
        subjects: names, in the order of the lines.
        labels: {subject: its name in the table}.
        flops: FLOPs of the lean floor of the mean timed step.
        causal_flops: FLOPs of that step as published MFU counts them.
        peak_flops: peak FLOP/s of the device by its data sheet; 0 = unknown, no MFU.
        targets, floor_target, mfu_target: see bench_cases.Case.
    """

    case: str
    title: str
    machine: str
    when: str
    dtype: str
    subjects: Sequence[str]
    labels: Mapping[str, str]
    flops: float
    causal_flops: float
    peak_flops: float
    targets: Mapping[str, float]
    floor_target: float
    mfu_target: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """All successful runs of a subject.

    Attributes:
        step_s: mean seconds per timed step of each run.
        tokens_per_s, trained_per_s: speed of the median run; padding never counts.
        peak_bytes: highest peak of all runs.
        cold_s, warm_s: seconds from command to first step, of the first run and the median of the
            others; None = no such run.
        before, after: held-out loss; None = not measured.
        trained: tokens trained in the timed steps; `after` is comparable only if they are equal.
        how, versions: see peers.contract.report.
    """

    step_s: Sequence[float]
    tokens_per_s: float
    trained_per_s: float
    peak_bytes: int
    cold_s: float | None
    warm_s: float | None
    before: float | None
    after: float | None
    trained: int
    how: str
    versions: Mapping[str, str]

    @property
    def median_s(self) -> float:
        """Seconds per step of the median run."""
        return statistics.median(self.step_s)


def summarize(records: Sequence[Record]) -> Summary:
    """Summarize the runs of a subject."""
    # A mean, not a median, within a run: rows differ in work, and each has its share of tokens.
    step_s = [statistics.fmean(record["step_s"]) for record in records]
    median = statistics.median(step_s)
    steps = len(records[0]["step_s"])
    later = [record["first_step_s"] for record in records if record["repeat"] > 0]
    first = [record["first_step_s"] for record in records if record["repeat"] == 0]
    checked = next((r for r in records if r["held_out_before"] is not None), {})
    return Summary(
        step_s=step_s,
        tokens_per_s=sum(records[0]["tokens"]) / steps / median,
        trained_per_s=sum(records[0]["trained"]) / steps / median,
        peak_bytes=max(record["peak_bytes"] for record in records),
        cold_s=first[0] if first else None,
        warm_s=statistics.median(later) if later else None,
        before=checked.get("held_out_before"),
        after=checked.get("held_out_after"),
        trained=sum(records[0]["trained"]),
        how=records[0]["how"],
        versions=records[0]["versions"],
    )


def void(summary: Summary, reference: Summary | None, dtype: str) -> str:
    """Return why a subject did not do the same work as the reference, or "" if it did.

    Two losses of the held-out examples have to match. The loss before training shows that weights,
    masks and shift are the same. The loss after training is compared only if both trained on
    equally many tokens; a subject with padded rows trains on fewer.
    """
    if reference is None or summary.before is None or reference.before is None:
        return "losses were not compared"
    pairs = [("before", summary.before, reference.before, BEFORE_TOLERANCE[dtype])]
    if summary.trained == reference.trained:
        assert summary.after is not None and reference.after is not None
        pairs.append(("after", summary.after, reference.after, AFTER_TOLERANCE[dtype]))
    for when, loss, reference_loss, tolerance in pairs:
        if not math.isclose(loss, reference_loss, rel_tol=tolerance):
            return f"loss {when} training {loss:.5f}, ours {reference_loss:.5f}"
    return ""


# ---- text --------------------------------------------------------------------------------------


def block(header: Header, records: Sequence[Record]) -> str:
    """Return the text between the markers, markers included.

    Args:
        records: results of this case, including those of "matmul/...".
    """
    case_records = [record for record in records if record["case"] == header.case]
    failed = {r["subject"]: r["error"] for r in case_records if "error" in r}
    summaries = {
        name: summarize(runs)
        for name in header.subjects
        if (runs := [r for r in case_records if r["subject"] == name and "error" not in r])
    }
    reference = summaries.get(REFERENCE)
    voids = {name: void(summary, reference, header.dtype) for name, summary in summaries.items()}
    has_mfu = header.peak_flops > 0
    titles = ["subject", "s/step", "tokens/s", "trained tokens/s", *(["MFU_c"] * has_mfu)]
    titles += ["peak GiB", "first step cold, warm", "held-out loss before, after"]
    lines = [_cells(titles), _cells(["---"] * len(titles))]
    for name in header.subjects:
        label = header.labels[name]
        if name in summaries:
            figures = _figures(summaries[name], header)
            if voids[name]:
                label += f" **VOID: {voids[name]}**"
            elif name in failed:
                label += f" (a run failed: {failed[name]})"
            lines.append(_cells([label, *figures]))
        else:
            reason = failed.get(name, "not asked for in this run")
            lines.append(_cells([label, f"no figure: {reason}", *[""] * (len(titles) - 2)]))
    repeats = max((len(summary.step_s) for summary in summaries.values()), default=0)
    start, end = markers(header.case, header.machine)
    return "\n".join(
        [
            start,
            f"**{header.title}**, AdamW, {header.dtype}. {header.machine}; {header.when}. Fresh "
            f"processes in turn, {repeats} of each: median (lowest to highest).",
            "",
            *lines,
            "",
            *_standing(header, summaries, voids, records),
            "",
            *_notes(header, summaries),
            end,
        ]
    )


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _figures(summary: Summary, header: Header) -> list[str]:
    spread = ""
    if len(summary.step_s) > 1:
        spread = f" ({min(summary.step_s):.3g} to {max(summary.step_s):.3g})"
    starts = [f"{s:.1f} s" if s is not None else "-" for s in (summary.cold_s, summary.warm_s)]
    losses = [f"{x:.5f}" if x is not None else "-" for x in (summary.before, summary.after)]
    mfu = [f"{mfu_c(summary, header):.1%}"] if header.peak_flops else []
    return [
        f"{summary.median_s:.3g}{spread}",
        f"{summary.tokens_per_s:,.0f}",
        f"{summary.trained_per_s:,.0f}",
        *mfu,
        f"{summary.peak_bytes / 2**30:.2f}",
        ", ".join(starts),
        ", ".join(losses),
    ]


def mfu_c(summary: Summary, header: Header) -> float:
    """Return MFU: model FLOP/s over the peak, with causal attention and without padding."""
    return header.causal_flops / summary.median_s / header.peak_flops


def floor_s(flops: float, records: Sequence[Record]) -> tuple[float, str] | None:
    """Return (seconds of the FLOPs at the best rate of jax, how it was measured), or None if it
    was not measured.
    """
    rates = [r for r in records if r["subject"] == "matmul/jax" and "flops_per_s" in r]
    if not rates:
        return None
    best = max(rates, key=lambda record: record["flops_per_s"])
    return flops / best["flops_per_s"], best["how"]


def _standing(
    header: Header,
    summaries: Mapping[str, Summary],
    voids: Mapping[str, str],
    records: Sequence[Record],
) -> list[str]:
    """Return the comparisons with peers and with the targets, as list items."""
    reference = summaries.get(REFERENCE)
    if reference is None:
        return ["* No comparison: our own run has no figure."]
    lines = []
    for name, summary in summaries.items():
        if name == REFERENCE:
            continue
        if voids[name]:
            lines.append(f"* {header.labels[name]}: void, {voids[name]}.")
            continue
        ratio = reference.trained_per_s / summary.trained_per_s
        verdict = _verdict(ratio, header.targets.get(name, 0.0), at_least=True)
        lines.append(f"* {ratio:.2f} times the trained tokens/s of {header.labels[name]}{verdict}")
    missing = [header.labels[name] for name in header.targets if name not in summaries]
    lines += [f"* {label}: no figure, so no comparison." for label in missing]
    if floor := floor_s(header.flops, records):
        seconds, how = floor
        ratio = reference.median_s / seconds
        lines.append(
            f"* {ratio:.2f} times the lean floor of {seconds:.3g} s"
            f"{_verdict(ratio, header.floor_target, at_least=False)} Floor: "
            f"{header.flops / 1e9:,.1f} GFLOP (head on trained positions, attention inside "
            f"examples) at {header.flops / seconds / 1e9:,.0f} GFLOP/s, the fastest product of "
            f"this run in jax ({how}){_in_torch(header, records, reference)}."
        )
    if header.peak_flops:
        verdict = _verdict(mfu_c(reference, header), header.mfu_target, at_least=True, percent=True)
        lines.append(f"* {mfu_c(reference, header):.1%} MFU_c{verdict}")
    return lines


def _in_torch(header: Header, records: Sequence[Record], reference: Summary) -> str:
    """Describe the floor at the rate of torch's products."""
    rates = [
        r["flops_per_s"] for r in records if r["subject"] == "matmul/torch" and "error" not in r
    ]
    if not rates:
        return ""
    seconds = header.flops / max(rates)
    return (
        f"; {reference.median_s / seconds:.2f} times the {seconds:.3g} s at the "
        f"{max(rates) / 1e9:,.0f} GFLOP/s of torch's"
    )


def _verdict(value: float, target: float, *, at_least: bool, percent: bool = False) -> str:
    if not target:
        return "."
    met = value >= target if at_least else value <= target
    bound = f"{target:.0%}" if percent else f"{target:g}"
    word = "at least" if at_least else "at most"
    return f" (target: {word} {bound}, {'met' if met else 'NOT MET'})."


def _notes(header: Header, summaries: Mapping[str, Summary]) -> list[str]:
    lines = []
    for name, summary in summaries.items():
        versions = ", ".join(f"{package} {number}" for package, number in summary.versions.items())
        lines.append(f"* {header.labels[name]}: {summary.how} ({versions}).")
    return lines


# ---- the file ----------------------------------------------------------------------------------


def markers(case: str, machine: str) -> tuple[str, str]:
    """Return the lines around the block of a case on a machine."""
    return f"<!-- bench {case} | {machine} -->", f"<!-- end of bench {case} | {machine} -->"


def replace(text: str, header: Header, new: str) -> str:
    """Return a document in which the block of this case and machine is replaced.

    A new block goes after the last block of any machine, or at the end if there is none.

    Raises:
        ValueError: the old block has a start marker but no end marker.
    """
    start, end = markers(header.case, header.machine)
    if start in text:
        before, _, rest = text.partition(start)
        if end not in rest:
            raise ValueError(f"{start!r} is in the file, but {end!r} is missing: repair the file")
        return before + new + rest.partition(end)[2]
    ends = [match.end() for match in re.finditer(r"<!-- end of bench .*? -->", text)]
    place = ends[-1] if ends else len(text.rstrip("\n"))
    tail = text[place:] or "\n"
    return text[:place] + "\n\n" + new + tail


def write(file: Path, header: Header, records: Sequence[Record]) -> None:
    """Rewrite the block of this case and machine in a file."""
    file.write_text(replace(file.read_text(), header, block(header, records)))
