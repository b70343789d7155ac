"""Validate the data settings. Called by `validate` and `inspect` before any row is read."""

import datetime
import re

from jax_sft import settings
from jax_sft.data.batches import mixture
from jax_sft.data.chat import chat_templates
from jax_sft.data.sources import read
from jax_sft.settings import Data, Source


def problems(data: Data) -> list[str]:
    """Return the problems of the data that can be detected without reading rows.

    `settings.problems` has checked single values.
    """
    messages = []
    if not data.train:
        messages.append("data.train is empty: add a source, data.train.NAME = config.source(path)")
    if not re.fullmatch(r"all|last|from:[1-9][0-9]*", data.turns):
        messages.append(f'data.turns = {data.turns!r}: use "all", "last" or "from:K" with K >= 1')
    try:
        datetime.date.fromisoformat(data.date)
    except ValueError:
        messages.append(f"data.date = {data.date!r}: write it like 2024-07-26")
    try:
        chat_templates.read(data.chat_template)
    except ValueError as error:
        messages.append(str(error))
    for kind, sources in (("train", data.train), ("eval", data.eval)):
        for name, source in sources.items():
            messages += [f"data.{kind}.{name}: {p}" for p in _source_problems(name, source)]
    for name, source in data.eval.items():
        if source.weight or source.epochs != 1:
            messages.append(
                f"data.eval.{name}: weight and epochs are for train sources; an eval set is seen "
                "whole each time"
            )
    return messages + mixture.problems(data.train)


def _source_problems(name: str, source: Source) -> list[str]:
    """Return the problems of one source."""
    messages = settings.problems(source, "source.")
    if not re.fullmatch(r"[\w.-]+", name):
        messages.append("the name may hold letters, digits, '_', '-' and '.' only")
    try:
        read.files(source)
    except ValueError as error:
        messages.append(str(error))
    return messages
