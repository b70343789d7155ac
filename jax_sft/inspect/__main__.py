"""Show which tokens a config would train, before training; needs no weights and no accelerator.

    python -m jax_sft.inspect --config=configs/tiny.py [--num=3] [--tokens] [--rows=2]
    python -m jax_sft.inspect --config=... --source=NAME --row=17
    python -m jax_sft.inspect --config=... --html=page.html --dump=tokens.jsonl

Prints the outcome for each source, the packing of its examples, and some examples in which the
tokens that train are marked. Any key of the config can be set as in training, for instance
--config.data.train.main.path=my.jsonl. Eval sets are named eval/NAME. Rows count from 0 within
their source.

--dump writes one JSON object per example, with the fields source, row, ids, mask and, if the
example was cut, truncated. mask holds the loss weight of each id, not shifted; the first id of an
example is never predicted, regardless of its mask. A refused or dropped row has the field error
instead.

Exit code: 0 if training would accept the data, 1 if it would refuse anything, 64 for a mistake in
the command or the config. NO_COLOR=1 turns colors off, FORCE_COLOR=1 turns them on.
"""

import dataclasses
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# This file is not jax_sft/inspect.py, and its folder has no __init__.py, so that `import inspect`
# still imports the standard library's module if jax_sft/ itself is on sys.path.
# `python jax_sft/train.py`, or any other script in that folder, puts it there.
from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()

import numpy as np
from absl import app, flags

from jax_sft import config, settings
from jax_sft.checkpoint import stop_tokens
from jax_sft.data import check, row_report
from jax_sft.data.batches import packing
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Schedule
from jax_sft.data.tokens import prepare
from jax_sft.data.tokens.detokenize import Detokenizer
from jax_sft.files import outputs
from jax_sft.report import data_page
from jax_sft.runtime import command_line, terminal
from jax_sft.runtime.text import numbered
from jax_sft.settings import Data, Settings
from jax_sft.weights import hf_folder

EXIT_REFUSED = 1
MOST_LEFT_OUT = 500  # refused and dropped rows listed per source; the dump has all
MOST_STEPS = 50  # most steps over which the balance is measured
MOST_RANKS = 8  # most ranks assumed for the balance if the mesh does not give their number


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of this command; their help describes them."""

    num: int = 3
    rows: int = 0
    row: int | None = None
    source: str = ""
    tokens: bool = False
    html: str = ""
    dump: str = ""


def inspect(cfg: config.Config, options: Options, color: bool) -> int:
    """Show what the config would train, as the command does.

    Returns:
        0, or EXIT_REFUSED.

    Raises:
        ValueError: the config or a source cannot be shown.
    """
    values = config.to_settings(cfg)
    if problems := settings.problems(values.data, "data.") + check.problems(values.data):
        raise ValueError(numbered("the config has {} problem(s)", problems))
    html = options.html and outputs.check_file(options.html, outputs.is_page, "--html")
    dump = options.dump and outputs.check_file(options.dump, is_dump, "--dump")
    folder = hf_folder.resolve(values.model.path, values.model.revision, weights=False)
    tokenizer = Detokenizer(folder)
    vocab = row_report.vocabulary(folder, tokenizer.size)
    sources = row_report.open_sources(values.data, folder)
    chosen = choose(sources, options)
    planned, refused = plan(values, sources, folder)
    refused += row_report.refusals(values.data, sources, vocab)
    rows = row_blocks(planned, sources, tokenizer) if planned else ()
    report = {s.name: s.report for s in sources if not s.name.startswith(row_report.EVAL)}
    ends = stop_tokens.inherited(folder) | stop_tokens.trained(report)
    stops = f"stops     {stop_tokens.line(folder, stop_tokens.named(folder), ends, report)}"
    overview = data_page.Overview(
        title=f"What trains: {values.model.path}, data.seq_len = {values.data.seq_len}",
        # Bad rows are listed further down.
        table=prepare.table({s.name: s.report | {"bad_rows": []} for s in sources}),
        packing=[*(packing_lines(planned, values) if planned else ()), stops],
        charts=list(charts(planned, sources, values.data)),
        examples=list(example_blocks(chosen, options, values.seed, tokenizer)),
        rows=list(itertools.islice(rows, options.rows)),
        left_out=list(left_out_lists(chosen)) if options.row is None else [],
        verdict=row_report.verdict(values.data, sources, refused),
        is_refused=bool(refused),
        is_lossy=bool(row_report.warnings(values.data, sources)),
    )
    if html:
        outputs.write_file(html, [data_page.page(overview, options.tokens)])
    if dump:
        objects = (entry.to_json(source.name) for source in sources for entry in source.entries())
        outputs.write_file(dump, (json.dumps(item) + "\n" for item in objects))
    print_all(data_page.screen(overview, color, options.tokens))
    return EXIT_REFUSED if refused else 0


# ---- the plan -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
    """The packed rows of the train sources.

    Attributes:
        rows: rows per step.
        micro_rows: rows per micro-batch.
        ranks: number of data-parallel ranks for which the balance is shown.
    """

    examples: Examples
    schedule: Schedule
    rows: int
    micro_rows: int
    ranks: int


def plan(
    values: Settings, sources: Sequence[row_report.Source], folder: Path
) -> tuple[Planned | None, list[str]]:
    """Return the rows of each step as training plans them, or (None, why it would refuse)."""
    used = {s.name: len(s.fit.kept) for s in sources if not s.name.startswith(row_report.EVAL)}
    if not any(used.values()):
        return None, ["to start: data.train has no example left"]
    data = row_report.lenient(values.data)
    examples = prepare.prepare(data.train, folder, data, progress=False)
    assert {name: len(ids) for name, ids in examples.sources.items()} == used
    # Accept settings that do not fit each other, as users inspect before they choose a machine.
    rows = max(values.batch.rows, 1)
    micro_rows = values.batch.micro_rows
    micro_rows = micro_rows if micro_rows > 0 and rows % micro_rows == 0 else rows
    ranks = values.mesh.data * values.mesh.fsdp
    if min(values.mesh.data, values.mesh.fsdp) < 1 or micro_rows % ranks:
        ranks = max(n for n in range(1, MOST_RANKS + 1) if micro_rows % n == 0)
    try:
        schedule = Schedule(
            *(examples, data, data.train),
            **{"rows": rows, "micro_rows": micro_rows},
            **{"shuffle": data.shuffle, "seed": values.seed},
        )
    except ValueError as error:  # a source has no examples in an epoch
        return None, [f"to start: {error}"]
    return Planned(examples, schedule, rows, micro_rows, ranks), []


# ---- the output ---------------------------------------------------------------------------------


def choose(sources: Sequence[row_report.Source], options: Options) -> list[row_report.Source]:
    """Return the sources to show.

    Raises:
        ValueError: --source or --row names no source or row of the config.
    """
    names = [source.name for source in sources]
    if options.source and options.source not in names:
        raise ValueError(f"--source={options.source} is not a source: use one of {names}")
    chosen = [source for source in sources if options.source in ("", source.name)]
    if options.row is not None:
        if len(chosen) > 1:
            raise ValueError(f"--row needs --source: use one of {names}")
        num_rows = chosen[0].report["rows"]
        if not 0 <= options.row < num_rows:
            raise ValueError(
                f"--row={options.row} is not there: {chosen[0].name} has rows 0 to {num_rows - 1}"
            )
    return chosen


def example_blocks(
    chosen: Sequence[row_report.Source], options: Options, seed: int, tokenizer: Detokenizer
) -> Iterator[data_page.Block]:
    """Yield one block per example of the row `options.row`, or of a sample of each source."""
    for source in chosen:
        if options.row is None:
            entries = [source.example(index) for index in sample(source, options.num, seed)]
        else:
            entries = source.row_entries(options.row)
        for entry in entries:
            title = f"{source.name}, row {entry.row} ({entry.where})"
            label = f"left out: {entry.error}" if entry.error else entry.describe()
            yield data_page.Block(title, [data_page.Segment(label, pieces(entry, tokenizer))])


def sample(source: row_report.Source, num: int, seed: int) -> list[int]:
    """Return the first example and a random example from each equal part of the others."""
    size = len(source.fit.kept)
    if size <= num:
        return list(range(size))
    rng = np.random.default_rng([seed, zlib.crc32(source.name.encode())])
    bounds = np.linspace(1, size, num).astype(int).tolist()
    others = [int(rng.integers(*part)) for part in itertools.pairwise(bounds)]
    return [0, *others][:num]


def row_blocks(
    planned: Planned, sources: Sequence[row_report.Source], tokenizer: Detokenizer
) -> Iterator[data_page.Block]:
    """Yield the packed rows of the first epoch, in the order of its batches."""
    by_name = {source.name: source for source in sources}
    names = list(planned.examples.sources)
    lengths, seq_len = planned.schedule.lengths, sources[0].seq_len
    for step in range(planned.schedule.steps_in(0)):
        for number, ids in enumerate(planned.schedule.rows_of(step)):
            segments, used = [], 0
            for segment, index in enumerate(ids.tolist(), start=1):
                name = names[planned.examples.source_of[index]]
                entry = by_name[name].example(index - planned.examples.sources[name].start)
                where = f"{name}, row {entry.row}, inputs {used} to {used + lengths[index] - 1}"
                label = f"segment {segment}: {where}; {entry.describe()}"
                segments.append(data_page.Segment(label, pieces(entry, tokenizer)))
                used += int(lengths[index])
            title = (
                f"step {step + 1}, row {number}: {len(ids)} segments, {used} of {seq_len} inputs"
            )
            yield data_page.Block(title, segments)


def pieces(entry: row_report.Entry, tokenizer: Detokenizer) -> list[data_page.Piece]:
    """Return the pieces of an example, each with its loss weight."""
    return tokenizer.pieces(entry.ids.tolist(), entry.target_weights.tolist())


def packing_lines(planned: Planned, values: Settings) -> list[str]:
    """Describe how full the rows of the first epoch are and how well their work is balanced."""
    schedule, data = planned.schedule, values.data
    rows, _ = schedule.plan(0)
    fill = rows.sums(schedule.lengths).mean() / data.seq_len
    segments = np.diff(rows.row_starts)
    steps = f"{schedule.steps_in(0):,} steps of {planned.rows:,} rows per epoch"
    if data.packing == "none":
        lines = [f"unpacked  {len(rows):,} rows, padded to what their batch needs; {steps}"]
    else:
        lines = [
            f"packed    {len(rows):,} rows of {data.seq_len:,} inputs, {fill:.2%} full; {steps}"
        ]
        lines += [f"segments  {segments.mean():.1f} per row, {segments.max()} at most"]
    if planned.ranks > 1:
        before, after = balance(planned)
        lines.append(
            f"balance   attention work of {planned.ranks} ranks, max/mean: {before:.3f} as packed, "
            f"{after:.3f} as trained"
        )
    return lines


def balance(planned: Planned) -> tuple[float, float]:
    """Return the mean imbalance of up to MOST_STEPS steps, before and after rows are ordered."""
    schedule = planned.schedule
    rows, work_of = schedule.plan(0)
    # Leave out the last batch of an epoch: it has empty rows, which no order can balance.
    full_steps = np.arange(max(len(rows) // planned.rows, 1))
    imbalances = []
    for step in full_steps[:: -(-len(full_steps) // MOST_STEPS)].tolist():
        packed = np.zeros(planned.rows, np.int64)
        step_work = work_of[step * planned.rows : (step + 1) * planned.rows]
        packed[: len(step_work)] = step_work
        ordered = [int((schedule.lengths[ids] ** 2).sum()) for ids in schedule.rows_of(step)]
        shape = (-1, planned.micro_rows)
        imbalances.append(
            [
                packing.imbalance(work.reshape(shape), planned.ranks)
                for work in (packed, np.array(ordered))
            ]
        )
    before, after = np.mean(imbalances, axis=0).tolist()
    return before, after


def charts(
    planned: Planned | None, sources: Sequence[row_report.Source], data: Data
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield (title, values, unit) of each histogram of the page."""
    if planned and data.packing != "none":
        rows, _ = planned.schedule.plan(0)
        yield "fill of rows", 100 * rows.sums(planned.schedule.lengths) / data.seq_len, "%"
        yield "segments per row", np.diff(rows.row_starts), " segments"
    for source in sources:
        lengths = source.fit.stops - source.store.starts[source.fit.kept] - 1
        yield f"lengths of {source.name}", lengths, " tokens"


def left_out_lists(
    chosen: Sequence[row_report.Source],
) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (heading, count, first lines) for the bad and the dropped rows of each source."""
    for source in chosen:
        num_bad = source.report["dropped"]["bad_row"]
        num_dropped = sum(source.report["dropped"].values()) - num_bad
        for count, what, entries in (
            (num_bad, "bad row(s)", source.bad_rows()),
            (num_dropped, "dropped", source.dropped()),
        ):
            lines = [
                f"row {entry.row} ({entry.where}): {' '.join(entry.error.split())}"
                for entry in itertools.islice(entries, MOST_LEFT_OUT)
            ]
            if lines:
                yield f"{source.name}: {count:,} {what}", count, lines


def is_dump(start: bytes) -> bool:
    """Return whether a file that begins with `start` was written by --dump."""
    return start.startswith(b'{"source": ')


def print_all(texts: Iterable[str]) -> None:
    """Print with the colors of `data_page`, which has escaped all other control sequences."""
    for text in texts:
        terminal.print_trusted(text)
    sys.stdout.flush()


# ---- the command line ---------------------------------------------------------------------------


def main(_: list[str]) -> int:
    """Run the command line."""
    given: dict[str, Any] = {
        field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)
    }
    color = not os.environ.get("NO_COLOR")
    color = color and bool(os.environ.get("FORCE_COLOR") or sys.stdout.isatty())
    return inspect(flags.FLAGS.config, Options(**given), color)


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_integer("num", 3, "Examples to show of each source", lower_bound=0)
    flags.DEFINE_integer("rows", 0, "Packed rows to show, in the order of training", lower_bound=0)
    flags.DEFINE_integer("row", None, "Show this row of --source, from 0", lower_bound=0)
    flags.DEFINE_string("source", "", "Show only this source: NAME, or eval/NAME")
    flags.DEFINE_boolean("tokens", False, "Also show where tokens begin and end")
    flags.DEFINE_string("html", "", "Also write what is shown as a page to this file")
    flags.DEFINE_string("dump", "", "Also write every example's tokens to this .jsonl file")
    lifecycle.run(lambda: app.run(main, flags_parser=command_line.parse_flags))
