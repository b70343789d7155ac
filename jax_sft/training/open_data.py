"""Open the data of a run: tokenized examples, loaders, the number of steps, and the stop tokens."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from jax_sft.checkpoint import stop_tokens
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens import losses, prepare
from jax_sft.hosts import cluster
from jax_sft.settings import STEPS_LIMIT
from jax_sft.training import optim
from jax_sft.training.open_run import Run


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: the training examples.
        eval: {name: examples} of the eval sets.
        loader: yields the training batches.
        eval_loaders: {name: loader} of the eval sets, in order and without shuffling.
        source_names: train sources whose loss is logged; empty unless log.per_source is set.
        num_steps: steps of the whole run.
        turn_ends: {token id: number of trained turns that end with it}.
        model_stops: token ids at which generation with the model stops.
        report: content of data_report.json.
    """

    train: Examples
    eval: dict[str, Examples]
    loader: Loader
    eval_loaders: dict[str, Loader]
    source_names: list[str]
    num_steps: int
    turn_ends: dict[int, int]
    model_stops: list[int]
    report: dict[str, Any]


def open_data(run: Run) -> Data:
    """Tokenize the data or reuse its cached tokens, and print a summary.

    Raises:
        ValueError: anything is wrong with the data.
    """
    settings = run.settings
    run.watch.at("reading the data")
    train, eval_sets = _prepare(run)
    loader, eval_loaders, source_names = _loaders(run, train, eval_sets)
    num_steps = settings.train.steps or loader.num_steps(settings.train.epochs)
    if num_steps >= STEPS_LIMIT:
        raise ValueError(
            f"train.epochs = {settings.train.epochs} gives {num_steps} steps: use fewer, so that "
            f"they are below {STEPS_LIMIT} (2**31)"
        )
    eval_report = {name: examples.report[name] for name, examples in eval_sets.items()}
    _describe(run, train.report, eval_report, loader, num_steps)
    turn_ends, model_stops = _stops(run, train)
    run.startup.end("data")
    return Data(
        train=train,
        eval=eval_sets,
        loader=loader,
        eval_loaders=eval_loaders,
        source_names=source_names,
        num_steps=num_steps,
        turn_ends=turn_ends,
        model_stops=model_stops,
        report={"train": train.report, "eval": eval_report},
    )


def _prepare(run: Run) -> tuple[Examples, dict[str, Examples]]:
    """Return the training examples and {name: examples} of the eval sets, the same on all hosts."""
    data, folder = run.settings.data, run.model.folder
    train = prepare.prepare(data.train, folder, data, progress=run.is_first)
    eval_sets = {
        name: prepare.prepare({name: source}, folder, data, progress=run.is_first)
        for name, source in sorted(data.eval.items())
    }
    every_set = {"train": train, **{f"eval/{name}": e for name, e in eval_sets.items()}}
    _check_vocabulary(every_set.values(), run.model.axis_sizes["vocab"])
    cluster.check_same(
        "data",
        {name: prepare.fingerprint(examples) for name, examples in every_set.items()},
        "Every host must see the same files",
    )
    return train, eval_sets


def _check_vocabulary(sets: Iterable[Examples], vocab: int) -> None:
    """Refuse token ids for which the model has no embedding.

    Raises:
        ValueError: the tokenizer does not belong to the model.
    """
    highest = max(counts["highest_id"] for e in sets for counts in e.report.values())
    if highest >= vocab:
        raise ValueError(
            f"the tokenizer gives token id {highest}, the model has only {vocab}: it belongs to "
            "another model, or tokens were added to it without resizing the embedding"
        )


def _loaders(
    run: Run, train: Examples, eval_sets: dict[str, Examples]
) -> tuple[Loader, dict[str, Loader], list[str]]:
    """Return the loader of `train`, the loaders of the eval sets, and the sources to log."""
    settings = run.settings
    source_names = list(train.sources) if settings.log.per_source else []
    load = functools.partial(
        Loader,
        data=settings.data,
        micro_rows=settings.micro_rows,
        mesh=run.mesh,
        seed=settings.seed,
    )
    loader = load(
        train,
        sources=settings.data.train,
        rows=settings.batch.rows,
        shuffle=settings.data.shuffle,
        per_source=bool(source_names),
    )
    eval_loaders = {
        name: load(examples, sources=None, rows=settings.micro_rows, shuffle=False)
        for name, examples in eval_sets.items()
    }
    return loader, eval_loaders, source_names


def _describe(
    run: Run,
    train_report: dict[str, Any],
    eval_report: dict[str, Any],
    loader: Loader,
    num_steps: int,
) -> None:
    """Print a summary of the data and warnings about likely mistakes."""
    named = {f"eval/{name}": counts for name, counts in eval_report.items()}
    run.say(prepare.table({**train_report, **named}))
    # One set at a time: the training data as a whole, then each eval set.
    for counts in (train_report, *({name: counts} for name, counts in named.items())):
        for warning in losses.warnings(counts):
            run.say(f"WARNING {warning}")
    run.say(
        f"packed  {loader.num_rows} rows, {loader.fill:.1%} full; "
        f"{loader.steps_per_epoch} steps per epoch"
    )
    for warning in optim.warnings(run.settings.optimizer, num_steps):
        run.say(f"WARNING {warning}")


def _stops(run: Run, train: Examples) -> tuple[dict[int, int], list[int]]:
    """Return the end tokens of trained turns and the stop tokens of the model; print both.

    Raises:
        ValueError: train.export_tokenizer_eos is set, but no token can become the tokenizer's
            eos_token.
    """
    folder = run.model.folder
    turn_ends = stop_tokens.inherited(folder) | stop_tokens.trained(train.report)
    model_stops = stop_tokens.named(folder)
    if run.settings.train.export_tokenizer_eos:
        stop_tokens.eos_text(folder, turn_ends)  # fails now, not after the training
    run.say(f"stops   {stop_tokens.line(folder, model_stops, turn_ends, train.report)}")
    return turn_ends, model_stops
