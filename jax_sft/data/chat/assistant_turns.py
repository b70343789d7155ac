"""Render a conversation so that each trained turn follows the exact prompt of inference.

Called by `encoding`. The result is usually one text, the whole conversation. Some templates rewrite
history once later messages follow (earlier thinking is stripped, the system text moves). Then the
result is the fewest texts in which each trained turn follows the prompt that inference would give.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax_sft.data.chat.printed import is_in, missing_part
from jax_sft.data.chat.template import ChatTemplate
from jax_sft.data.sources.formats import Conversation

# An empty block is context, as in the prompt of a model that is asked not to think.
EMPTY_THINK = re.compile(r"<think>\s*</think>\n{0,2}")
OPENED_THINK = re.compile(r"<think>(\s*)\Z")
SHORT = 12  # characters; a shorter text may occur in a conversation by chance
CLOSING_THINK = re.compile(r"\s*</think>\n{0,2}")


@dataclasses.dataclass(frozen=True)
class Turn:
    """The trained characters [start, stop) of a text.

    Attributes:
        end_token: start of their end-of-turn token; None if the text has none.
    """

    start: int
    end_token: int | None
    stop: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A text, its trained turns, and the conversation it was rendered from."""

    text: str
    turns: tuple[Turn, ...]
    conversation: Conversation | None = None
    num_cut: int = 0  # turns left out at the start of the conversation


def render(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    turns: str = "all",
    train_empty_think: bool = False,
) -> list[Rendered]:
    """Render a conversation as the fewest texts; each trained turn is trained in exactly one.

    The trained part of a turn begins where its generation prompt ends, as at inference. It ends
    with its end-of-turn token; what the template appends to that token (usually a newline) is not
    trained.

    Args:
        turns: "all", "last" or "from:K", see `data.turns`.

    Raises:
        ValueError: why the trained text is not what inference would emit: the template refuses the
            messages, leaves out or changes part of one, or ends a turn without a special token.
    """
    weights = turn_weights(conversation.messages, turns)
    messages = template.styled(conversation.messages)
    tools = conversation.tools
    text = template.render(messages, tools)
    check_tools(template, text, messages, tools)
    trained = []
    for number, weight in weights.items():
        is_last = number == len(messages) - 1
        through = text if is_last else template.render(messages[: number + 1], tools)
        turn, through = _find_turn(
            template, messages[: number + 1], tools, through, train_empty_think
        )
        trained.append(_Trained(number, dataclasses.replace(turn, weight=weight), through))
    results = []
    for carrier, num_messages, carried in _fewest_texts(text, len(messages), trained):
        turns_of_text = {trained_turn.number: trained_turn.turn for trained_turn in carried}
        check_context(template, carrier, messages[:num_messages], tools, turns_of_text)
        part = _only_training(conversation.messages[:num_messages], turns_of_text)
        results.append(Rendered(carrier, tuple(turns_of_text.values()), Conversation(part, tools)))
    return results


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A trained turn, the number of its message, and the text that ends with it."""

    number: int
    turn: Turn
    through: str


def _fewest_texts(
    text: str, num_messages: int, trained: Sequence[_Trained]
) -> list[tuple[str, int, list[_Trained]]]:
    """Choose texts that carry all turns: (text, messages in it, turns), in the order of the turns.

    A text carries every turn whose own text is a prefix of it. The turns are assigned from the last
    one back: each goes to the text of the whole conversation if that carries it, otherwise to that
    of a later turn, otherwise to its own.
    """
    texts: list[tuple[str, int, list[_Trained]]] = [(text, num_messages, [])]
    for trained_turn in reversed(trained):
        prefix = trained_turn.through[: trained_turn.turn.stop]
        carried = next((carried for text, _, carried in texts if text.startswith(prefix)), None)
        if carried is None:
            texts.append((trained_turn.through, trained_turn.number + 1, [trained_turn]))
        else:
            carried.insert(0, trained_turn)
    used = [entry for entry in texts if entry[2]] or texts
    return used[::-1]


def _only_training(
    messages: Sequence[dict[str, Any]], trained: Mapping[int, Turn]
) -> list[dict[str, Any]]:
    """Return the messages with the weights of these turns; other assistant turns weigh 0."""
    stripped = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]
    for number, message in enumerate(stripped):
        if message["role"] == "assistant":
            message["weight"] = trained[number].weight if number in trained else 0.0
    return stripped


def only(rendered: Rendered, chosen: Sequence[int], to_end: bool) -> Rendered:
    """Return the text of a conversation with some of its turns; the others become context.

    Args:
        chosen: positions in `rendered.turns`, ascending.
        to_end: keep the text after the last of them; otherwise only white space is kept, with which
            templates end a turn.
    """
    assert rendered.conversation
    text, last = rendered.text, rendered.turns[chosen[-1]]
    end = len(text) if to_end else len(text) - len(text[last.stop :].lstrip())
    messages = rendered.conversation.messages
    numbers = list(turn_weights(messages, "all"))
    kept = {numbers[n]: rendered.turns[n] for n in chosen}
    messages = messages if to_end else messages[: max(kept) + 1]
    return dataclasses.replace(
        rendered,
        text=text[:end],
        turns=tuple(kept.values()),
        conversation=Conversation(_only_training(messages, kept), rendered.conversation.tools),
    )


def turn_weights(messages: Sequence[dict[str, Any]], turns: str) -> dict[int, float]:
    """Return {message number: weight} of the assistant turns that are trained."""
    numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if turns == "last":
        numbers = numbers[-1:]
    elif turns.startswith("from:"):
        numbers = numbers[int(turns.removeprefix("from:")) - 1 :]
    weights = {}
    for number in numbers:
        message = messages[number]
        weight = float(message.get("weight", 1.0)) if message.get("train", True) else 0.0
        if weight:
            weights[number] = weight
    return weights


def _find_turn(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict] | None,
    through: str,
    train_empty_think: bool,
) -> tuple[Turn, str]:
    """Find the last message, an assistant's, in the text that ends with it.

    Returns:
        the turn (of weight 1), and the text up to its end as inference would prompt and continue
        it.
    """
    if len(messages) == 1:
        raise ValueError("the conversation starts with an assistant message")
    message = messages[-1]
    prompt = template.render(messages[:-1], tools, prompt=True)
    through = through.removesuffix(template.final_text)
    is_whole = through.startswith(prompt)
    if not is_whole:
        through = _continue_think(prompt, through, message, template.special)
    start = len(prompt)
    ends = _end_of_turn(through, _behind(through, split_think(message)[1], start), template.special)
    if ends is None:
        raise ValueError(
            "the chat template ends an assistant turn without a special token, so a model "
            f"trained on it would never stop: {through[start:][-60:]!r}"
        )
    template_block = _template_think(template, message, prompt, through)
    _check_turn(through[start + template_block : ends[0]], message)
    parts = [p for p in ("reasoning_content", "tool_calls", "content") if message.get(p)]
    last = len(messages) - 1
    if is_whole and parts[1:] and not template.prints(messages, tools, last, *parts):
        raise ValueError(f"the chat template leaves out {' or '.join(parts)} of a message")
    if template.has_tags and is_whole:
        spans = [span for span in template.tagged(messages, tools) if span[1] >= start]
        gaps = itertools.pairwise(spans)
        if not spans or any(through[end:following].strip() for (_, end), (following, _) in gaps):
            raise ValueError("the chat template's {% generation %} tags leave out part of a turn")
        start = max(start, min(spans[0][0], ends[0]))
    if not train_empty_think:
        start = max(start, len(prompt) + template_block)
    return Turn(start, *ends, weight=1.0), through


def _continue_think(prompt: str, through: str, message: dict, special: Sequence[str]) -> str:
    """Continue a prompt that opens a think block with the reasoning that the template strips.

    DeepSeek-R1's template renders answers without reasoning, yet starts every turn with "<think>".
    The model then emits reasoning, "</think>" and the answer.
    """
    opened = OPENED_THINK.search(prompt)
    if not opened or not through.startswith(prompt[: opened.start()]):
        raise ValueError(
            "the chat template renders an assistant turn in another way than its generation "
            f"prompt begins one: {prompt[-40:]!r}"
        )
    reasoning, answer = split_think(message)
    if reasoning is None or message.get("tool_calls"):
        raise ValueError(
            f"the generation prompt ends with {opened.group()!r}, the answer has no reasoning: "
            'write it as "<think>...</think>answer" in the content'
        )
    ends = _end_of_turn(through, _behind(through, answer, opened.start()), special)
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        emitted = f"{reasoning.strip()}\n</think>\n\n{answer}"
    else:
        emitted = content.lstrip().removeprefix("<think>").removeprefix(opened.group(1))
    return prompt + emitted + (through[ends[0] : ends[1]] if ends else "")


def _template_think(template: ChatTemplate, message: dict, prompt: str, through: str) -> int:
    """Return the length of an empty think block that the template put before the answer."""
    own = (message.get("content") or "").lstrip().startswith("<think>")
    if own and not template.writes_empty_think:
        return 0
    block = EMPTY_THINK.match(through, len(prompt))
    if not block and OPENED_THINK.search(prompt):
        block = CLOSING_THINK.match(through, len(prompt))
    return len(block.group()) if block else 0


def _behind(text: str, answer: str, start: int) -> int:
    """Return the end of the answer, searched from `start` on; `start` if the text lacks it."""
    closed = text.rfind("</think>", start)
    place = text.find(answer.strip(), max(start, closed))
    return max(place, start) + (len(answer.strip()) if place >= 0 else 0)


def _end_of_turn(text: str, start: int, special: Sequence[str]) -> tuple[int, int] | None:
    """Return (start, end) of the special token that ends the text, white space aside.

    The token must not start before `start`; None if there is no such token.
    """
    end = len(text.rstrip())
    token = next((t for t in special if text.endswith(t, start, end)), None)
    return (end - len(token), end) if token else None


def _check_turn(body: str, message: dict[str, Any]) -> None:
    """Refuse a turn whose text is not all of the message and nothing else.

    Raises:
        ValueError: part of the message is missing, or the text has something that is not of the
            message.
    """
    reasoning, answer = split_think(message)
    lacking = next((part for part in (reasoning or "", answer) if not is_in(part, body)), None)
    lacking = missing_part(message, body) if lacking is None else lacking
    if lacking is not None:
        raise ValueError(f"the chat template leaves out part of a message: {lacking!r:.80}")
    content = message.get("content") or ""
    has_calls = bool(message.get("tool_calls"))
    if (
        has_calls
        or body.strip() in (content.strip(), answer.strip())
        and not (reasoning or "").strip()
    ):
        return
    thought = f"{reasoning}</think>{answer}"
    if "".join(body.split()).removeprefix("<think>") != "".join(thought.split()):
        raise ValueError(
            f"the chat template adds text of its own to an answer: {body.strip()!r:.200}"
        )


def split_think(message: dict[str, Any]) -> tuple[str | None, str]:
    """Return (reasoning or None, answer) of an assistant message.

    Reasoning is a field of its own, or the single think block at the start of the content. Content
    with more think tags than that is an answer as a whole.
    """
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    before, closed, answer = content.partition("</think>")
    reasoning = before.lstrip().removeprefix("<think>")
    if not closed or "<think>" in reasoning + answer or "</think>" in answer:
        return None, content
    return reasoning, answer


def check_context(
    template: ChatTemplate,
    text: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict] | None,
    trained: Mapping[int, Turn],
) -> None:
    """Refuse a text that drops a context message; only earlier thinking may be dropped.

    Args:
        trained: {number of a trained message: its turn in the text}.

    Raises:
        ValueError: a message is not in the text.
    """
    place, in_order, doubtful = 0, True, []
    for number, message in enumerate(messages):
        if number in trained:
            place = trained[number].stop
            continue
        following = next((turn.start for n, turn in trained.items() if n > number), len(text))
        kept = message.get("content") or ""
        if message["role"] == "assistant":
            kept = split_think(message)[1]
        if not is_in(kept, text) or missing_part(message, text) is not None:
            raise ValueError(f"the chat template leaves out part of message {number}")
        position = text.find(kept.strip(), place, following)
        place, in_order = max(position + len(kept.strip()), place), in_order and position >= 0
        # A text shorter than SHORT may have been found within another message.
        sure = len(kept.strip()) >= SHORT and not message.get("tool_calls")
        doubtful.append((number, sure))
    for number, sure in doubtful:
        parts = [part for part in ("content", "tool_calls") if messages[number].get(part)]
        if parts and not (sure and in_order or template.prints(messages, tools, number, *parts)):
            raise ValueError(f"the chat template leaves out part of message {number}")


def check_tools(
    template: ChatTemplate,
    text: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict] | None,
) -> None:
    """Refuse a template that silently drops tools.

    Raises:
        ValueError: a tool is not in the rendered text.
    """
    without = template.render(messages, None) if tools else ""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool must be an object with a name, not {tool!r:.80}")
        if text.count(name) <= without.count(name):
            raise ValueError(f"the chat template leaves out the tool {name!r}")
