"""Validate `cfg.data`. Called by `validate` and `inspect` before any row is read."""

import datetime
import re
from typing import Any

from jax_sft import config
from jax_sft.data.batches import mixture
from jax_sft.data.chat import chat_templates
from jax_sft.data.sources import formats, read

CHOICES = {
    "overlong": ("raise", "drop", "truncate", "truncate_history"),
    "on_bad_row": ("raise", "skip"),
    "packing": ("best_fit", "none"),
}
AT_LEAST = {"seq_len": 1, "max_segments": 1, "num_workers": 0, "max_row_bytes": 1000, "cache_gb": 0}


def problems(data) -> list[str]:
    """Return the problems of `cfg.data` that can be detected without reading rows."""
    messages = [
        f"data.{key} = {data[key]!r}: use one of {list(known)}"
        for key, known in CHOICES.items()
        if data[key] not in known
    ]
    messages += [
        f"data.{key} = {data[key]}: use at least {least}"
        for key, least in AT_LEAST.items()
        if data[key] < least
    ]
    if not 0 <= data.max_lost <= 1:
        messages.append(f"data.max_lost = {data.max_lost}: use a share from 0 to 1")
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
        if _is_source(source) and (source.weight or source.epochs != 1):
            messages.append(
                f"data.eval.{name}: weight and epochs are for train sources; an eval set is seen "
                "whole each time"
            )
    sound = all(_is_source(source) for source in data.train.values())
    return messages + (mixture.problems(data.train) if sound else [])


def _is_source(source: Any) -> bool:
    return hasattr(source, "keys") and set(source.keys()) == set(config.source(""))


def _source_problems(name: str, source: Any) -> list[str]:
    if not _is_source(source):
        return ["is not a source: write data.train.NAME = config.source(path)"]
    messages = []
    if not re.fullmatch(r"[\w.-]+", name):
        messages.append("the name may hold letters, digits, '_', '-' and '.' only")
    if source.format and source.format not in formats.FORMATS:
        messages.append(f"format = {source.format!r}: use one of {list(formats.FORMATS)}")
    if source.limit < 0:
        messages.append(f"limit = {source.limit}: use 0 for all rows, or a positive number")
    try:
        read.files(source)
    except ValueError as error:
        messages.append(str(error))
    return messages
