"""Messages to tokens, and the only place that decides which tokens train.

The conversation is rendered once with the tokenizer's own chat template and tokenized whole.
Assistant turns are found by character offsets, never by token ids, so text that imitates the
template cannot make a user token train.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import transformers

Span = tuple[int, int]  # characters [start, end)

# What rendering a template can raise on data that it was not written for.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, AttributeError),
    *(LookupError, ArithmeticError, RecursionError),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, shifted: `targets[i]` is the token after `tokens[i]`.

    Attributes:
        tokens: int32 [n], model inputs.
        targets: int32 [n], next tokens.
        weights: float32 [n], 1 where the target trains, else 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def load_tokenizer(folder: Path):
    """Load the tokenizer of a model folder, without running any code from it.

    Raises:
        ValueError: no usable fast tokenizer, or no chat template.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no tokenizer.json: character offsets need a fast tokenizer")
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template: put one into chat_template.jinja "
            "beside it, for instance from the instruction-tuned version of the model"
        )
    return tokenizer


def render(tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None, prompt=False) -> str:
    """Render messages with the chat template; `prompt` adds the start of an assistant turn.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def assistant_turns(
    tokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict] | None
) -> tuple[str, list[Span]]:
    """Render a conversation and find its assistant turns.

    A turn starts where the generation prompt ends, as at inference, and ends where the rendering
    of the messages up to it ends (its end-of-turn token and what the template puts behind it).

    Returns:
        (text, spans of the assistant turns).

    Raises:
        ValueError: the first message is the assistant's, the template leaves part of a message
            out, or renders earlier messages differently once later ones follow.
    """
    text = render(tokenizer, messages, tools)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise ValueError("the conversation starts with an assistant message")
        before = render(tokenizer, messages[:number], tools, prompt=True)
        through = render(tokenizer, messages[: number + 1], tools)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template renders message {number} differently within the conversation"
            )
        turn = through[len(before) :]
        for part in [message["content"], *call_parts(message)]:
            if not is_in(part, turn):
                raise ValueError(f"the chat template leaves out part of message {number}: {part!r}")
        spans.append((len(before), len(through)))
    check_nothing_left_out(tokenizer, text, messages, tools)
    return text, spans


def check_nothing_left_out(
    tokenizer, text: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict] | None
) -> None:
    """Refuse a template that drops context without a word.

    Raises:
        ValueError: a message's content or a tool is not in the rendered text.
    """
    for number, message in enumerate(messages):
        if not is_in(message["content"], text):
            raise ValueError(f"the chat template leaves out part of message {number}")
    without = render(tokenizer, messages, None) if tools else ""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool must be an object with a name, not {tool!r:.80}")
        if text.count(name) <= without.count(name):
            raise ValueError(f"the chat template leaves out the tool {name!r}")


def call_parts(message: dict[str, Any]) -> list[str]:
    """Return the names and argument values of a message's tool calls.

    Raises:
        ValueError: a tool call without a function name.
    """
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise ValueError(f"tool_calls must be a list, not {calls!r:.80}")
    parts = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise ValueError(f"a tool call must be an object with a function name: {call!r:.80}")
        parts += [name, *_leaves(function.get("arguments", {}))]
    return parts


def _leaves(value: Any) -> list[str]:
    """The strings and numbers within a JSON value, as they are printed."""
    if isinstance(value, dict):
        return [leaf for part in value.items() for leaf in _leaves(list(part))]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value if isinstance(value, str) else json.dumps(value)]


def is_in(part: str, text: str) -> bool:
    """Whether a text holds a part: as it is, without outer white space, or escaped as in JSON."""
    escaped = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return part.strip() in text or any(form in text for form in escaped)


def encode(tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> Example:
    """Turn a conversation into an Example whose assistant turns train.

    In each turn everything up to and including the end-of-turn token trains; what the template
    puts behind it (a newline, usually) does not.

    Raises:
        ValueError: see `assistant_turns`; or a turn without an end-of-turn token.
    """
    text, spans = assistant_turns(tokenizer, messages, tools)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half a character (a lone surrogate): {error}") from error
    ids, offsets = _tokenize(tokenizer, text, [start for start, _ in spans])
    special = np.isin(ids, _special_ids(tokenizer))
    trains = np.zeros(len(ids), np.float32)
    for start, end in spans:
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > start)
        stops = np.flatnonzero(inside & special)
        if not len(stops) or text[offsets[stops[-1], 1] : end].strip():
            raise ValueError(
                "the chat template ends an assistant turn without a special token, so a model "
                f"trained on it would never stop: {text[start:end][-60:]!r}"
            )
        trains[np.flatnonzero(inside)[0] : stops[-1] + 1] = 1.0
    ids = ids.astype(np.int32)
    return Example(tokens=ids[:-1], targets=ids[1:], weights=trains[1:])


def _special_ids(tokenizer) -> list[int]:
    added = tokenizer.added_tokens_decoder
    return [i for i, token in added.items() if token.special] + tokenizer.all_special_ids


def _tokenize(tokenizer, text: str, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize the whole text; if a token crosses the start of a turn, cut the text there.

    A model continues a prompt from exactly that edge, so it can never emit a token across it.

    Returns:
        ids int64 [n], character offsets int64 [n, 2].
    """
    ids, offsets = _encode_text(tokenizer, text)
    crossed = [e for e in edges if _crosses(offsets, e)]
    if crossed:
        bounds = [0, *crossed, len(text)]
        pieces = [
            (start, *_encode_text(tokenizer, text[start:end]))
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        ids = np.concatenate([ids for _, ids, _ in pieces])
        offsets = np.concatenate([offsets + start for start, _, offsets in pieces])
    return ids, offsets


def _crosses(offsets: np.ndarray, edge: int) -> bool:
    """Whether a token has characters on both sides of an edge.

    Some tokenizers leave white space at the start of a token out of its offsets: where the
    characters before the edge belong to no token, the token behind it may have swallowed them.
    """
    within = (offsets[:, 0] < edge) & (offsets[:, 1] > edge)
    before = offsets[offsets[:, 1] <= edge, 1]
    return bool(within.any()) or (edge > 0 and before.max(initial=0) < edge)


def _encode_text(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    # The template writes BOS itself: the tokenizer must not add another.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int64), offsets
