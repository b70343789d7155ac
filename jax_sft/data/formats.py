"""Rows of a data file to messages. A new format is one function here and one entry in FORMATS.

Messages are OpenAI's: dicts with `role` and `content`, and `tool_calls` in assistant turns.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]  # messages, tools
ROLES = ("system", "user", "assistant", "tool")


def read_rows(source) -> datasets.Dataset:
    """Open the rows of a .json or .jsonl source.

    Raises:
        ValueError: the file is missing, of another kind, malformed, or has no rows.
    """
    file = Path(source.path).expanduser()
    if not file.is_file():
        raise ValueError(f"data file {source.path!r} does not exist")
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(f"data file {source.path!r} must be .json or .jsonl")
    if file.stat().st_size == 0:
        raise ValueError(f"data file {source.path!r} is empty")
    try:
        with file.open(encoding="utf-8") as lines:
            for _ in lines:  # a file that is not UTF-8 must not be guessed at
                continue
        rows = _load(file)
        features = datasets.Features(_undated(rows.features))
        if features != rows.features:
            rows = _load_as_text(file, features)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise ValueError(
            f"data file {source.path!r} cannot be read: {error.__cause__ or error}"
        ) from error
    if len(rows) == 0:
        raise ValueError(f"data file {source.path!r} has no rows")
    return rows.select(range(min(source.limit, len(rows)))) if source.limit else rows


def _load_as_text(file: Path, features: datasets.Features) -> datasets.Dataset:
    """Read rows so that dates stay the text they are in the file: Arrow would turn them."""
    text = file.read_text(encoding="utf-8").strip()
    parsed = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    complete = [{key: row.get(key) for key in features} for row in parsed]
    return datasets.Dataset.from_list(complete, features=features)


def _load(file: Path) -> datasets.Dataset:
    # Never from datasets' cache, which knows a file by its path and time, not by its content.
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset(
            "json",
            data_files=str(file),
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
    assert isinstance(rows, datasets.Dataset)
    return rows


def _undated(feature: Any) -> Any:
    """Return a feature, or structure of features, in which dates and times are strings."""
    if isinstance(feature, datasets.Value):
        dated = feature.dtype.startswith(("timestamp", "date", "time"))
        return datasets.Value("string") if dated else feature
    if isinstance(feature, dict):
        return {key: _undated(value) for key, value in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_undated(feature.feature))
    return feature


def prompt_response(row: dict[str, Any], source) -> Conversation:
    """Optional system, then user = prompt (+ newline + query), then assistant = response."""
    messages = []
    if source.system_key and (system := _text(row, source.system_key, optional=True)):
        messages.append({"role": "system", "content": system})
    prompt = _text(row, source.prompt_key)
    if source.query_key and (query := _text(row, source.query_key, optional=True)):
        prompt += "\n" + query
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": _text(row, source.response_key)})
    return messages, None


def messages(row: dict[str, Any], source) -> Conversation:
    """A column of messages as they are, with an optional column of tools."""
    found = row.get(source.messages_key)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{source.messages_key!r} must be a list of messages, not {found!r:.80}")
    cleaned = []
    for number, message in enumerate(found):
        where = f"{source.messages_key}[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where} must be an object whose role is one of {ROLES}")
        # A column with the same fields in every row gives absent ones as null.
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.setdefault("content", ""), str):
            raise ValueError(f"{where}.content must be a string, not {message['content']!r:.80}")
        if not message["content"] and not message.get("tool_calls") and message["role"] != "tool":
            raise ValueError(f"{where} has neither content nor tool_calls")
        cleaned.append(message)
    tools = row.get(source.tools_key) or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{source.tools_key!r} must be a list of tools, not {tools!r:.80}")
    return cleaned, tools


FORMATS: dict[str, Callable[[dict[str, Any], Any], Conversation]] = {
    "prompt_response": prompt_response,
    "messages": messages,
}


def choose(source, columns: Iterable[str]) -> str:
    """Return the format of a source: the one it names, or the one its columns tell.

    Raises:
        ValueError: no format fits, or columns that the format needs are not there.
    """
    columns = list(columns)
    needed = {
        "messages": [source.messages_key],
        "prompt_response": [
            key
            for key in (source.prompt_key, source.query_key, source.response_key, source.system_key)
            if key
        ],
    }
    fits = [name for name, keys in needed.items() if set(keys) <= set(columns)]
    if source.format in FORMATS and source.format in fits:
        return source.format
    if source.format and source.format not in FORMATS:
        raise ValueError(f"format {source.format!r} is not one of {list(FORMATS)}")
    if fits and not source.format:
        return fits[0]
    wanted = needed[source.format] if source.format else needed
    raise ValueError(
        f"{source.path}: columns {columns} do not have {wanted}: set the source's *_key options"
    )


def _text(row: dict[str, Any], key: str, optional: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, str) and (value or optional):
        return value
    if optional and value is None:
        return ""
    raise ValueError(f"field {key!r} must be a non-empty string, not {value!r:.80}")
