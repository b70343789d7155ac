"""Messages to tokens, and the only place that decides which tokens train.

The conversation is rendered once with the tokenizer's own chat template and tokenized whole.
Assistant turns are found by character offsets, never by token ids, so text that imitates the
template cannot make a user token train.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import transformers

Span = tuple[int, int]  # characters [start, end)


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
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
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
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
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
    for tool in tools or ():
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise ValueError(f"the chat template leaves out the tool {name!r}")
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
        calls = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
        for part in (message["content"].strip(), *calls):
            if part not in turn:
                raise ValueError(f"the chat template leaves out part of message {number}: {part!r}")
        spans.append((len(before), len(through)))
    return text, spans


def encode(tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> Example:
    """Turn a conversation into an Example whose assistant turns train.

    In each turn everything up to and including the end-of-turn token trains; what the template
    puts behind it (a newline, usually) does not.

    Raises:
        ValueError: see `assistant_turns`; or a turn without an end-of-turn token.
    """
    text, spans = assistant_turns(tokenizer, messages, tools)
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
    crossed = [e for e in edges if np.any((offsets[:, 0] < e) & (offsets[:, 1] > e))]
    if crossed:
        bounds = [0, *crossed, len(text)]
        pieces = [
            (start, *_encode_text(tokenizer, text[start:end]))
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        ids = np.concatenate([ids for _, ids, _ in pieces])
        offsets = np.concatenate([offsets + start for start, _, offsets in pieces])
    return ids, offsets


def _encode_text(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    # The template writes BOS itself: the tokenizer must not add another.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int64), offsets
