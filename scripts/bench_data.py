"""Measure the data pipeline against a named baseline on the same data in the same run.

    python -m scripts.bench_data planning [--data FILE ... --tokenizer FOLDER]
    python -m scripts.bench_data balance  [the same]
    python -m scripts.bench_data loading
    python -m scripts.bench_data tokenizing --data FILE ... --tokenizer FOLDER

Lengths are log-normal (median 200 tokens). With --data, the lengths of texts from JSON or JSONL
files under a tokenizer.json are measured too. Planning and ordering use one thread. Their times are
processor time, so that other work on the machine does not count. No files are kept.
"""

import argparse
import functools
import heapq
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from jax_sft.batch import empty_rows
from jax_sft.data.batches import packing
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader, Schedule, fill_row
from jax_sft.data.chat import encoding
from jax_sft.data.sources import formats, read
from jax_sft.data.tokens import worker
from jax_sft.runtime import confined
from jax_sft.settings import Data, Source
from jax_sft.sharding.mesh import single_device_mesh

NODE_TOKENS_PER_S = 100_000  # about what eight H200s train of a 7B model
# Grain's packers without threads: with its default of 16, they are ten times slower on two cores.
IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

ROWS = 4  # per rank and micro-batch, in the comparison of orders


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--num", type=int, default=100_000, help="log-normal examples")
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="JSON or JSONL files")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json, for --data")
    options = parser.parse_args()
    if options.data and not options.tokenizer:
        parser.error("--data needs --tokenizer")
    names = ("jax", "grain", "numpy", "tokenizers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}\n")
    SECTIONS[options.section](options)


def cpu() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
    print()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return (a function's result, the seconds of processor time that it took)."""
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


# ---- lengths -------------------------------------------------------------------------------------


def log_normal(num: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(np.log(200), 0.8, num).astype(np.int64) + 1


def length_sets(options) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, lengths) of the synthetic data and of each file."""
    yield f"{options.num:,} log-normal lengths", log_normal(options.num)
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    for file in options.data:
        text = file.read_text(encoding="utf-8")
        if not text.startswith("["):  # JSONL
            text = "[" + ",".join(line for line in text.split("\n") if line.strip()) + "]"
        texts = ["\n".join(strings(row)) for row in json.loads(text)]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        yield file.name, np.array([len(item.ids) for item in encodings if item.ids], np.int64)


def strings(value: Any) -> Iterator[str]:
    """Yield all strings within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


# ---- planning: rows, fill and time against grain's packers ---------------------------------------


def planning(options) -> None:
    """Compare our plan with the lower bound, best-fit decreasing alone and grain's packers."""
    for name, all_lengths in length_sets(options):
        for seq_len in (2048, 4096):
            lengths = all_lengths[all_lengths <= seq_len]
            print(f"{name}, {len(lengths):,} of at most {seq_len} tokens")
            compare_packers(lengths, seq_len)
    lengths = log_normal(1_000_000).clip(max=4096)
    plan, seconds = timed(lambda: plan_of(lengths, 4096))
    print(f"1,000,000 log-normal lengths in rows of 4096: {seconds:.2f} core seconds", end="")
    print(f", {len(plan):,} rows")


def plan_of(lengths: np.ndarray, seq_len: int) -> packing.PackPlan:
    return packing.plan(
        lengths,
        np.arange(len(lengths)),
        seq_len,
        **{"packing": "best_fit", "max_segments": 256, "shuffle": True, "seed": 0, "epoch": 0},
    )


def compare_packers(lengths: np.ndarray, seq_len: int) -> None:
    examples = [{"tokens": np.zeros(length, np.int32)} for length in lengths.tolist()]
    shuffled = grain.MapDataset.source(examples).shuffle(seed=0)

    def pack_with_rows() -> int:
        plan, row = plan_of(lengths, seq_len), np.zeros(seq_len, np.int32)
        for ids in (plan.row(index) for index in range(len(plan))):
            tokens = np.concatenate([examples[index]["tokens"] for index in ids])
            row[: len(tokens)] = tokens
        return len(plan)

    def grain_rows(packer, **more) -> int:
        structure = {"length_struct": {"tokens": seq_len}} | more
        return sum(1 for _ in packer(shuffled.to_iter_dataset(IN_THIS_THREAD), **structure))

    num_packed_rows, planning_s = timed(lambda: len(plan_of(lengths, seq_len)))
    methods: dict[str, Callable[[], int]] = {
        "best-fit decreasing alone": lambda: best_fit_decreasing(lengths, seq_len),
        "ours, and rows of tokens": pack_with_rows,
    }
    for bins in (64, 512):
        more = {"num_packing_bins": bins, "max_sequences_per_bin": 256}
        for packer in (
            grain.experimental.FirstFitPackIterDataset,
            grain.experimental.BestFitPackIterDataset,
        ):
            label = f"grain {packer.__name__.removesuffix('IterDataset')}, {bins} bins"
            methods[label] = lambda packer=packer, more=more: grain_rows(packer, **more)
    methods["grain ConcatThenSplit (cuts examples)"] = lambda: grain_rows(
        grain.experimental.ConcatThenSplitIterDataset
    )
    results = {"ours": (num_packed_rows, planning_s)} | {
        name: timed(run) for name, run in methods.items()
    }
    tokens = int(lengths.sum())
    rows = [["lower bound", f"{-(-tokens // seq_len):,}", "", "", ""]]
    for name, (num_rows, seconds) in results.items():
        fill, times = tokens / num_rows / seq_len, seconds / planning_s
        rows.append([name, f"{num_rows:,}", f"{fill:.2%}", f"{seconds:.3f}", f"{times:.1f}"])
    table(["", "rows", "fill", "core seconds", "x ours"], rows)


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    return int(packing._best_fit(np.sort(lengths)[::-1], seq_len, 256).max()) + 1


# ---- balance: attention work of data-parallel ranks ----------------------------------------------


def balance(options) -> None:
    """Print the highest over the mean sum of squared lengths per rank, for each order of rows."""
    for name, all_lengths in length_sets(options):
        lengths = all_lengths[all_lengths <= 4096]
        for method in ("best_fit", "none"):
            print(f'{name} in rows of 4096, packing "{method}", 4 micro-batches of {ROWS} per rank')
            rows = []
            for num_ranks in (8, 64):
                rows += compare_orders(lengths, method, num_ranks)
            table(["ranks, order", "per step", "per micro-batch", "ms/batch"], rows)


def compare_orders(lengths: np.ndarray, method: str, num_ranks: int) -> list[list[str]]:
    """Return one table row per order, with means over up to 20 global batches."""
    micro_rows, num_rows = ROWS * num_ranks, 4 * ROWS * num_ranks
    plan = packing.plan(
        lengths,
        np.arange(len(lengths)),
        4096,
        **{"packing": method, "max_segments": 256, "shuffle": True, "seed": 0, "epoch": 0},
    )
    work = plan.sums(lengths**2)
    batches = work[: len(work) // num_rows * num_rows].reshape(-1, num_rows)[:20]
    if len(batches) == 0:
        return [[f"{num_ranks}, fewer than {num_rows} rows", "", "", ""]]

    def known_ranks(work: np.ndarray) -> np.ndarray:
        micro = np.argsort(-work, kind="stable").reshape(-1, micro_rows)
        return np.concatenate(
            [m[np.concatenate(karmarkar_karp(work[m], num_ranks))] for m in micro]
        )

    orders: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "as packed": lambda work: np.arange(len(work)),
        "ours": lambda work: packing.balance(work, micro_rows),
        "Karmarkar-Karp over the step": lambda work: (
            np.array(karmarkar_karp(work, num_ranks))
            .reshape(num_ranks, -1, ROWS)
            .swapaxes(0, 1)
            .reshape(-1)
        ),
        "Karmarkar-Karp in our micro-batches": known_ranks,
    }
    rows = []
    for name, order in orders.items():
        ordered, seconds = timed(lambda order=order: [batch[order(batch)] for batch in batches])
        micro = [batch.reshape(-1, micro_rows) for batch in ordered]
        # The work of each rank in a step: the sum over its micro-batches.
        step_work = [m.reshape(-1, num_ranks, ROWS).sum((0, 2)) for m in micro]
        per_step = np.mean([packing.imbalance(rank_work, num_ranks) for rank_work in step_work])
        per_micro = np.mean([packing.imbalance(m, num_ranks) for m in micro])
        ms = 1000 * seconds / len(batches)
        rows.append([f"{num_ranks}, {name}", f"{per_step:.4f}", f"{per_micro:.4f}", f"{ms:.2f}"])
    return rows


def karmarkar_karp(work: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Return the rows of each rank by largest differencing (Karmarkar & Karp 1982).

    Every rank gets the same number of rows. ROLL and verl balance a step this way. Rows of
    neighboring work start as a group of one set per rank. The two groups whose sets differ most are
    joined, the heaviest set of one with the lightest of the other, until one group is left.
    """
    ascending = np.argsort(work, kind="stable").tolist()
    groups = []
    for number, start in enumerate(range(0, len(ascending), num_ranks)):
        sets = [(int(work[row]), [row]) for row in ascending[start : start + num_ranks]]
        heapq.heappush(groups, (sets[0][0] - sets[-1][0], number, sets))
    while len(groups) > 1:
        _, _, first = heapq.heappop(groups)
        _, number, second = heapq.heappop(groups)
        pairs = zip(first, reversed(second), strict=True)
        joined = sorted(
            ((a + b, rows + other_rows) for (a, rows), (b, other_rows) in pairs),
            key=lambda s: s[0],
        )
        heapq.heappush(groups, (joined[0][0] - joined[-1][0], number, joined))
    return [sorted(rows) for _, rows in groups[0][2]]


# ---- loading: packed batches per second ----------------------------------------------------------


def loading(options) -> None:
    """Compare loading of 4096-token rows with grain's packer and with what a node trains."""
    with tempfile.TemporaryDirectory() as folder:
        examples = mapped_examples(log_normal(options.num).clip(max=4096), Path(folder))
        print(f"{options.num:,} log-normal examples, rows of 4096 tokens, batches of 64 rows")
        compare_loaders(examples, num_steps=40)


def mapped_examples(lengths: np.ndarray, folder: Path) -> Examples:
    """Return examples of random tokens whose arrays are memory-mapped, as in the cache."""
    rng, sizes = np.random.default_rng(0), lengths + 1
    stops = np.cumsum(sizes)
    stored = {
        "ids": rng.integers(0, 150_000, stops[-1], dtype=np.int32),
        "weights": (rng.random(stops[-1]) < 0.5).astype(np.float32),
    }
    for name, array in stored.items():
        np.save(folder / f"{name}.npy", array)
    ids, weights = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in stored)
    num = len(lengths)
    return Examples(
        arrays=[(ids, weights)],
        source_of=np.zeros(num, np.uint16),
        starts=stops - sizes,
        stops=stops,
        rows=np.arange(num),
        sources={"main": range(num)},
        report={},
    )


def compare_loaders(examples: Examples, num_steps: int) -> None:
    data, num_rows = Data(seq_len=4096), 64
    batch = {"rows": num_rows, "micro_rows": num_rows, "shuffle": True, "seed": 0}
    schedule = Schedule(examples, data, None, **batch)
    mesh = single_device_mesh()
    loader = Loader(examples, data, None, **batch, mesh=mesh)
    num_steps = min(num_steps, loader.steps_per_epoch)

    def rows_alone() -> None:
        for step in range(num_steps):
            built = empty_rows(num_rows, 4096)
            for place, ids in enumerate(schedule.rows_of(step)):
                fill_row({name: rows[place] for name, rows in built.items()}, examples, ids)

    def batches() -> None:
        for ready in loader.batches(0, num_steps):
            ready["tokens"].block_until_ready()

    def grain_batches() -> None:
        features = ("tokens", "targets", "weights")
        source = [vars(examples[index]) for index in range(len(examples))]
        packed = grain.experimental.FirstFitPackIterDataset(
            grain.MapDataset.source(source).shuffle(seed=0).to_iter_dataset(IN_THIS_THREAD),
            length_struct=dict.fromkeys(features, 4096),
            num_packing_bins=64,
            max_sequences_per_bin=256,
        )
        for number, _ in enumerate(packed.batch(num_rows), start=1):
            if number == num_steps:
                return

    rows = []
    for name, run in (
        ("ours: building rows, one thread", rows_alone),
        ("ours: batches on the device, grain's threads", batches),
        ("grain FirstFitPack, 64 bins, and batch", grain_batches),
    ):
        began = time.perf_counter()
        _, core_s = timed(run)
        seconds = time.perf_counter() - began
        tokens = num_steps * num_rows * 4096
        rows.append([name, f"{tokens / seconds / 1e6:.2f}", f"{tokens / core_s / 1e6:.2f}"])
        rows[-1].append(f"{tokens / core_s / NODE_TOKENS_PER_S:.0f}")
    table(["", "M tokens/s", "M tokens/s per core", f"x {NODE_TOKENS_PER_S:,} tokens/s"], rows)


def tokenizing(options: argparse.Namespace) -> None:
    """Compare encoding of JSON rows with the tokenizers library alone on the same texts.

    Runs in one thread, chunk by chunk. Each chunk is encoded five times both ways in turn, and the
    fastest run of each counts.
    """
    if not options.data:
        raise SystemExit("error: tokenizing needs --data and --tokenizer")
    os.environ |= confined.ENVIRONMENT
    tokenizer = encoding.load_tokenizer(options.tokenizer)
    encoder, backend = encoding.Encoder(tokenizer, encoding.Options()), tokenizer.backend_tokenizer
    rows = []
    for file in options.data:
        source = guessed_source(file)
        chunks = list(read.chunks(source, [file]))
        name, _ = formats.choose(source, [r.row for r in read.parse(chunks[0]) if r.row])
        encode = worker.Encoder(
            worker.Job(options.tokenizer, encoding.Options(), source, name)
        ).encode
        num_examples = num_tokens = 0
        alone_s = encode_s = 0.0
        for chunk in chunks:
            items = [formats.FORMATS[name](r.row, source) for r in read.parse(chunk) if r.row]
            conversations = [item for item in items if not isinstance(item, formats.Tokens)]
            texts = [rendered.text for item in conversations for rendered in encoder.render(item)]
            ways = (functools.partial(only_ids, backend, texts), functools.partial(encode, chunk))
            runs = [[timed(way) for way in ways] for _ in range(5)]
            alone_s += min(seconds for (_, seconds), _ in runs)
            encode_s += min(seconds for _, (_, seconds) in runs)
            encoded = runs[0][1][0]
            assert not encoded.refused, encoded.refused
            num_examples, num_tokens = num_examples + len(texts), num_tokens + len(encoded.ids)
        rows.append(
            [file.name, str(sum(map(len, chunks))), str(num_examples), f"{num_tokens:,}"]
            + [f"{alone_s:.2f} s", f"{encode_s:.2f} s", f"{num_tokens / encode_s:,.0f}"]
            + [f"{alone_s / encode_s:.2f}"]
        )
    header = ("file", "rows", "examples", "tokens", "library alone", "ours", "tokens/s", "ratio")
    table(header, rows)


def only_ids(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids from the tokenizers library alone."""
    return [encoded.ids for encoded in backend.encode_batch(texts, add_special_tokens=False)]


def guessed_source(file: Path) -> Source:
    """Return a source for messages, question and answer, or instruction, input and response."""
    keys = next(read.parse(next(read.chunks(Source(str(file)), [file])))).row or {}
    if "messages" in keys:
        return Source(str(file))
    if "question" in keys:
        return Source(str(file), prompt_key="question", response_key="answer")
    return Source(str(file), prompt_key="instruction", query_key="input")


SECTIONS = {"planning": planning, "balance": balance, "loading": loading, "tokenizing": tokenizing}

if __name__ == "__main__":
    main()
