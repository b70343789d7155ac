"""Every token that trains is the right one: encoding.Encoder against an independent ground truth.

What a template prints is written out by hand in chat_templates.py and checked here against
transformers; tokens are marked by the offsets of the whole text, tokenized once.
"""

import copy
import dataclasses
import datetime
import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import chat_templates
import numpy as np
import pytest
import tokenizers
import transformers.utils.chat_template_utils as transformers_templates
from chat_templates import FAMILIES, HOSTILE, KINDS, Family, Messages, Piece, Refused, Tools
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.batches.examples import Encoded
from jax_sft.data.chat import encoding
from jax_sft.data.sources.formats import Conversation, Text
from tests import tiers

SHARED = Path(__file__).resolve().parents[4] / "shared"
DATE = chat_templates.DATE
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A tokenizer under test, the ground truth of its template, and how it tokenizes."""

    name: str
    tokenizer: Any
    family: Family
    kind: chat_templates.Kind
    backend: tokenizers.Tokenizer  # with the offsets of all characters

    def encoder(self, **options: Any) -> encoding.Encoder:
        return encoding.Encoder(self.tokenizer, encoding.Options(**{"date": DATE, **options}))

    def decode(self, ids) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def full_offsets(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer's own backend, reporting white space as part of tokens."""
    as_json = json.loads(tokenizer.backend_tokenizer.to_str())

    def untrimmed(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in part.items()}
        return [untrimmed(one) for one in part] if isinstance(part, list) else part

    as_json["post_processor"] = untrimmed(as_json["post_processor"])
    return tokenizers.Tokenizer.from_str(json.dumps(as_json))


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    """Make, save, load and keep the tokenizer of a family and a kind."""
    made: dict[tuple[str, str], Subject] = {}

    def subject(family: str | Family, kind: str = "bytes") -> Subject:
        name = family if isinstance(family, str) else family.source
        if (name, kind) not in made:
            of = FAMILIES[family] if isinstance(family, str) else family
            folder = tmp_path_factory.mktemp("tokenizer")
            chat_templates.save(of, kind, folder)
            tokenizer = encoding.load_tokenizer(folder)
            made[name, kind] = Subject(name, tokenizer, of, KINDS[kind], full_offsets(tokenizer))
        return made[name, kind]

    return subject


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


def call(name: str = "get_weather", /, **arguments: Any) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": "call56789", "function": function}


# ---- the ground truth --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Truth:
    """One text, and per turn that may train in it: {message number: its characters}."""

    text: str
    spans: dict[int, tuple[int, int]]


def joined(pieces: list[Piece]) -> str:
    return "".join(text for _, text in pieces)


def span_of(pieces: list[Piece], number: int) -> tuple[int, int]:
    """The characters that a message emits."""
    stops = list(itertools.accumulate(len(text) for _, text in pieces))
    own = [i for i, (owner, _) in enumerate(pieces) if owner == number]
    return stops[own[0]] - len(pieces[own[0]][1]), stops[own[-1]]


def truths(
    family: Family, messages: Messages, tools: Tools, trained: list[int], empty: bool = False
) -> list[Truth]:
    """The fewest texts in which each trained turn stands right behind its prompt at inference.

    A turn stands right in every text that starts with its own: the conversation up to it, printed
    without what follows. So the texts are the whole conversation and the turns' own ones, less
    those that another one starts with.

    Raises:
        Refused: the template cannot print it.
    """
    own = {}
    for number in trained:
        pieces = family.pieces(messages[: number + 1], tools, empty)
        own[number] = joined(pieces), span_of(pieces, number)
    whole = joined(family.pieces(messages, tools, empty))
    held = []
    for text in (*(text for text, _ in own.values()), whole):
        spans = {n: span for n, (to, span) in own.items() if text.startswith(to[: span[1]])}
        held.append(Truth(text, spans))
    return [
        truth
        for i, truth in enumerate(held)
        if not any(truth.spans.keys() <= later.spans.keys() for later in held[i + 1 :])
        and not any(truth.spans.keys() < other.spans.keys() for other in held)
    ]


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def reference(subject: Subject, messages: Messages, tools: Tools, prompt: bool = False) -> str:
    """What transformers itself renders, on the date of the tests."""
    if subject.family.text_arguments:
        messages = json.loads(json.dumps(messages))
        for one in (one for message in messages for one in message.get("tool_calls") or ()):
            one["function"]["arguments"] = chat_templates.dumps(one["function"]["arguments"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_templates, "datetime", Frozen)
        return subject.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )


def check_truth(subject: Subject, messages: Messages, tools: Tools) -> None:
    """The hand-written pieces are what transformers renders, and follow its generation prompts."""
    pieces = subject.family.pieces(messages, tools, False)
    assert joined(pieces) == reference(subject, messages, tools)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:
            pieces = subject.family.pieces(messages[: number + 1], tools, False)
            start, _ = span_of(pieces, number)
            prompt = reference(subject, messages[:number], tools, prompt=True)
            before = joined(pieces)[:start]
            assert before.startswith(prompt)
            block = before.removeprefix(prompt).split()
            assert block in ([], ["<think>", "</think>"], ["</think>"])


# ---- what the encoder gave, against it ---------------------------------------------------------


def control_tokens(subject: Subject) -> re.Pattern:
    tokens = (t.content for t in subject.backend.get_added_tokens_decoder().values())
    return re.compile("|".join(sorted(map(re.escape, tokens), key=len, reverse=True)))


def given_back(subject: Subject, text: str) -> str:
    """A text as the kind of tokenizer gives it back, as far as that can be told."""
    kind, control = subject.kind, control_tokens(subject).pattern
    space = r"[^\S\x1c-\x1f]*"
    if kind.lstrip:
        text = re.sub(f"{space}({control})", r"\1", text)
    if kind.rstrip:
        text = re.sub(f"({control}){space}", r"\1", text)
    if kind.changes in ("spaces", "sentencepiece's space"):
        text = text.replace("▁", " ")
    if kind.changes == "spaces":
        control = control.replace("▁", " ")
        text = re.sub(f"({control}) ?", r"\1", text).removeprefix(" ")
    return unicodedata.normalize("NFC", text) if kind.changes == "normal form" else text


def tokens_of(
    subject: Subject, text: str, spans: dict[int, tuple[int, int]]
) -> tuple[list[int], dict[int, slice]] | None:
    """The text tokenized at once and the tokens of each span; None if a token crosses the start
    of a span, or what stands before it is not tokenized so at inference.
    """
    encoding = subject.backend.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets)
    slices = {}
    for number, (start, stop) in spans.items():
        first = int(np.searchsorted(offsets[:, 0], start))
        if offsets[first - 1, 1] != start or start not in offsets[first : first + 1, 0]:
            return None
        slices[number] = slice(first, int(np.searchsorted(offsets[:, 0], stop)))
        if encoding.ids[:first] != prompt_ids(subject, text[:start]):
            return None
    return encoding.ids, slices


def prompt_ids(subject: Subject, prompt: str) -> list[int]:
    return subject.backend.encode(prompt, add_special_tokens=False).ids


def trained_runs(example: Encoded) -> list[slice]:
    trains = np.concatenate([[False], example.weights > 0, [False]])
    edges = np.flatnonzero(trains[1:] != trains[:-1])
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]


def placements(found: list[Truth]) -> list[list[dict[int, tuple[int, int]]]]:
    """The turns of each text; one that stands right in several trains in one, either end."""
    placed = []
    for order in (1, -1):
        left = {n for truth in found for n in truth.spans}
        spans = []
        for truth in found[::order]:
            spans.append({n: span for n, span in truth.spans.items() if n in left})
            left -= spans[-1].keys()
        placed.append(spans[::order])
    return placed


def check(
    subject: Subject,
    messages: Messages,
    tools: Tools,
    examples: list[Encoded] | str,
    weights: dict[int, float] | None = None,
    empty: bool = False,
) -> None:
    """Assert that the examples of a conversation are those of the ground truth, token by token."""
    if weights is None:
        weights = {n: 1.0 for n, m in enumerate(messages) if m["role"] == "assistant"}
    assert not isinstance(examples, str), examples
    expected = truths(subject.family, messages, tools, sorted(weights), empty)
    # Where bytes are left out, the offsets behind them are wrong.
    is_clean = subject.kind.changes != "bytes" and all(
        tokens_of(subject, truth.text, truth.spans) for truth in expected
    )
    if not is_clean:
        check_prefixes(subject, messages, tools, examples, weights, empty)
        assert len(expected) <= len(examples) <= max(len(weights), 1)
        return
    assert len(examples) == len(expected)
    counts = [len(trained_runs(example)) for example in examples]
    placed = [spans for spans in placements(expected) if [len(s) for s in spans] == counts]
    assert placed, f"{counts} turns train, not one of {placements(expected)}"
    for truth, spans, example in zip(expected, placed[0], examples, strict=True):
        assert example.ids.dtype == np.int32 and example.weights.dtype == np.float32
        ids, slices = tokens_of(subject, truth.text, spans) or pytest.fail("it is clean")
        assert example.ids.tolist() == ids
        marked = np.zeros(len(ids), np.float32)
        for number, part in slices.items():
            marked[part] = weights[number]
        assert example.weights.tolist() == marked.tolist()


def check_prefixes(
    subject: Subject,
    messages: Messages,
    tools: Tools,
    examples: list[Encoded],
    weights: dict[int, float],
    empty: bool,
) -> None:
    """Assert that each turn trains once, behind exactly the tokens of its prompt at inference.

    A token of the whole text crosses the start of a turn: a model could not emit it, so the text is
    cut there. To later turns that one is history, which inference does not cut.
    """
    wanted = []
    for number, weight in weights.items():
        pieces = subject.family.pieces(messages[: number + 1], tools, empty)
        text, (start, stop) = joined(pieces), span_of(pieces, number)
        emitted = given_back(subject, text[start:stop])
        wanted.append((tuple(prompt_ids(subject, text[:start])), emitted, weight))
    found = []
    for example in examples:
        for run in trained_runs(example):
            before = subject.decode(example.ids[: run.start])
            emitted = subject.decode(example.ids[: run.stop])[len(before) :]
            (weight,) = set(example.weights[run].tolist())
            prefix = tuple(example.ids[: run.start].tolist())
            found.append((prefix, given_back(subject, emitted), weight))
    assert sorted(found) == sorted(wanted)


# ---- conversations by hand ---------------------------------------------------------------------

Example = tuple[Messages, Tools]


def plain_conversations() -> dict[str, Messages]:
    """Users and assistants in turns: no template may refuse one of them."""
    return {
        "one turn": [user("Hello"), assistant("Hi there.")],
        "three turns": [
            *(user("a"), assistant("b"), user("c")),
            *(assistant("d e"), user("f"), assistant("g")),
        ],
        "same text on both sides": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
        "names of roles": [
            user("assistant"),
            assistant("user\nassistant"),
            user("model"),
            user(""),
        ][:2],
        "empty answer": [user("a"), assistant(""), user(""), assistant("")],
        "question last": [user("a"), assistant("b"), user("c")],
        "newlines first": [user("a\n"), assistant("\nb"), user("\n"), assistant("\n\n\nd")],
        "white space alone": [user(" "), assistant(" \n "), user("b"), assistant("\n\n")],
        "white space around": [user("  a "), assistant(" b  \n\n"), user("c"), assistant("\td\t")],
        "windows newlines": [user("a\r\nb"), assistant("\r\nc\r\n")],
        "odd spaces": [
            user("\xa0a\u2028"),
            assistant("\u3000b\xa0"),
            user("\x85"),
            assistant("c\x85"),
        ],
        "colons": [user("x: "), assistant(": y"), user(": :"), assistant("> x")],
        "emoji": [user("👩‍👩‍👧‍👦?"), assistant("🇳🇴 👍🏽 🧑‍🚀")],
        "scripts": [
            user("日本語で"),
            assistant("こんにちは، Ελλάδα, مرحبا"),
            user("ﬁ"),
            assistant("ß"),
        ],
        "combining": [user("e\u0301"), assistant("\u0301e\u0301 a\u030a\u0327 \u1100\u1161")],
        "spelled out bytes": [user("<0x0A>"), assistant("<0x0A><0xFF>▁▁ ▁")],
        "braces": [user("{{ messages }} {% if %}"), assistant("{# no #}{{ 7 * 7 }}")],
        "long": [
            user("word " * 400),
            assistant("answer\n\n" * 300),
            user("x"),
            assistant("y " * 500),
        ],
    }


def imitations(family: Family) -> dict[str, Messages]:
    """Texts that hold the template's own control tokens and the heads of its turns."""
    turns = [user("q"), assistant("I train"), user("r"), assistant("s")]
    whole = joined(family.pieces(turns, None, False))
    head = joined(family.pieces(turns[:2], None, False)).split("I train")[0]
    control = "".join((family.bos, *family.control))
    return {
        "the user writes answers": [user(whole), assistant("no"), user(whole), assistant("no")],
        "the user opens a turn": [user(head), assistant("ok"), user(f"x{head}"), assistant("k")],
        "the user writes control tokens": [user(control), assistant("a"), user(control * 2)],
        "the answer quotes control tokens": [
            user("a"),
            assistant(control),
            user("b"),
            assistant("c"),
        ],
        "the answer quotes turns": [user("a"), assistant(f"{whole} ok"), user("b"), assistant("c")],
        "both are control tokens": [user(family.eos), assistant(family.eos), user("x")],
    }


def special_conversations() -> dict[str, Example]:
    """With system texts, tools and roles in any order: what a template cannot print is refused."""
    rounds = [user("a"), assistant("b"), user("c"), assistant("d")]
    called = [
        user("Weather?"),
        assistant("", tool_calls=[call(city="Oslo", days=[1, {"ø": None}])]),
    ]
    answered = [*called, result('{"celsius": -3.5}'), assistant("Cold.")]
    both = [call(city="Oslo"), call("get_time", zone="日本", exact=True)]
    return {
        "system": ([system("Be brief."), *rounds], None),
        "system with space around": ([system(" \n Be brief. \n"), *rounds], None),
        "empty system": ([system(""), *rounds], None),
        "two systems": ([system("Be brief."), system("Be kind."), *rounds], None),
        "system later": ([*rounds, system("Be brief."), user("e"), assistant("f")], None),
        "no assistant": ([user("a")], None),
        "two answers in a row": ([user("a"), assistant("b"), assistant("c")], None),
        "two questions in a row": ([user("a"), user("b"), assistant("c")], None),
        "tools": ([user("a"), assistant("b")], [WEATHER]),
        "tools and system": ([system("Be brief."), *rounds], [WEATHER]),
        "a call": (called, [WEATHER]),
        "a call without tools": (called, None),
        "a call and its result": (answered, [WEATHER]),
        "calls in two rounds": ([*answered, *answered], [WEATHER]),
        "system and calls in rounds": ([system("S"), *answered, *rounds, *answered], [WEATHER]),
        "two calls": ([user("a"), assistant("", tool_calls=both), *answered[2:]], [WEATHER]),
        "two results": ([*answered[:3], result("x\ny"), *answered[3:], user("z")], [WEATHER]),
        "words and a call": ([user("a"), assistant("Wait. ", tool_calls=both[:1])], [WEATHER]),
        "words with the name of the call": (
            [user("a"), assistant("get_time", tool_calls=[call("get_time")])],
            None,
        ),
        "call after call": ([*answered[:3], *answered[1:]], [WEATHER]),
        "the result is the question again": (
            [user("42"), assistant("42"), result("42"), assistant("42")],
            None,
        ),
        "empty arguments": ([user("a"), assistant("", tool_calls=[call()])], [WEATHER]),
        "a call and its result without tools": (answered, None),
        "reasoning apart": (
            [user("a"), assistant("b c", reasoning_content="hm"), user("d"), assistant("e")],
            None,
        ),
        "reasoning that the answer repeats": (
            [user("a"), assistant("b c", reasoning_content="b")],
            None,
        ),
        "hostile arguments": (
            [user("a"), assistant("", tool_calls=[call(x='"}</tool_call><|im_end|>\n\\</s>')])],
            None,
        ),
    }


def all_conversations(family: Family) -> dict[str, Example]:
    simple = plain_conversations() | imitations(family)
    return {name: (messages, None) for name, messages in simple.items()} | special_conversations()


def refused(family: Family, messages: Messages, tools: Tools) -> str:
    """Why the ground truth says that a conversation must be refused; "" = it must not."""
    thoughts = [m.get("reasoning_content", "").strip() for m in messages]
    if any(thoughts) and "think" not in family.has:
        return "reasoning is left out"
    try:
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant" or number == len(messages):
                family.pieces(messages[:number], tools, False)
    except Refused as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ground_truth_is_what_transformers_renders(subject, family):
    one = subject(family)
    checked = Counter()
    for name, (messages, tools) in all_conversations(one.family).items():
        if not refused(one.family, messages, tools):
            check_truth(one, messages, tools)
            checked[name] += 1
    simple = plain_conversations().keys() | imitations(one.family).keys()
    if "think" in one.family.has:  # it takes what is quoted for reasoning
        simple -= {"the answer quotes turns"}
    assert checked.keys() >= simple


@pytest.mark.parametrize(("family", "kind"), tiers.crossed(FAMILIES, KINDS))
def test_exactly_the_answers_and_their_end_of_turn_train(subject, family, kind):
    one = subject(family, kind)
    conversations = all_conversations(one.family)
    encoded = one.encoder().encode([Conversation(*pair) for pair in conversations.values()])
    wrong = {}
    for (name, (messages, tools)), examples in zip(conversations.items(), encoded, strict=True):
        try:
            if reason := refused(one.family, messages, tools):
                assert isinstance(examples, str), f"trains although {reason}"
            elif not (isinstance(examples, str) and may_be_refused(one, messages, tools)):
                check(one, messages, tools, examples)
        except AssertionError as error:
            wrong[name] = str(error)[:300]
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_before_an_answer_are_those_of_the_prompt(subject, kind):
    # The prompt ends in spaces, which tokenizers join with what follows, or split because of it.
    one = subject("colons", kind)
    for answer in ("Hello", "Q", " Q", "  ", "", "\n", " \nx", "é", "12", "\t"):
        messages = [system("S"), user("a"), assistant(answer), user("b"), assistant(answer)]
        (examples,) = one.encoder().encode([Conversation(messages, None)])
        if isinstance(examples, str) and may_be_refused(one, messages, None):
            continue
        check(one, messages, None, examples)
        example = examples[0]
        assert isinstance(example, Encoded)
        prompt = reference(one, messages[:2], None, prompt=True)
        ids = one.backend.encode(prompt, add_special_tokens=False).ids
        assert example.ids[: len(ids)].tolist() == ids
        assert example.weights[: len(ids) + 1].tolist() == [0] * len(ids) + [1]


def may_be_refused(subject: Subject, messages: Messages, tools: Tools) -> bool:
    """Whether the tokenizer does not give back what the assistant says."""
    emissions = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            pieces = subject.family.pieces(messages[: number + 1], tools, True)
            emissions.append(joined([piece for piece in pieces if piece[0] == number]))
            # Reasoning that holds the tags of reasoning: it is not told apart again.
            if "think>" in message.get("reasoning_content", ""):
                return True
    if subject.kind.changes == "bytes":
        return True
    if subject.kind.changes == "spaces":  # it puts a space behind every control token
        return any("▁" in e or control_tokens(subject).search(e).end() < len(e) for e in emissions)
    return any(given_back(subject, emission) != emission for emission in emissions)


# ---- reasoning ---------------------------------------------------------------------------------

THOUGHTS = {
    "one": [user("a"), assistant("<think>\nx\n</think>\n\nb")],
    "both": [
        *(user("a"), assistant("<think>\nx y\n</think>\n\nb")),
        *(user("c"), assistant("<think>\nz\n</think>\n\nd")),
    ],
    "first": [user("a"), assistant("<think>\nx\n</think>\n\nb"), user("c"), assistant("d")],
    "last": [user("a"), assistant("b"), user("c"), assistant("<think>\nx\n</think>\n\nd")],
    "in other white space": [user("a"), assistant("<think>x \n\n y</think>b"), user("c")],
    "without an opening tag": [user("a"), assistant("x\n</think>\n\nb")],
    "of several lines": [user("a"), assistant("<think>\n\n1.\n\n2.\n\n</think>\n\n\nb\n")],
    "alone": [user("a"), assistant("<think>\nx\n</think>\n\n")],
    "empty block": [user("a"), assistant("<think>\n\n</think>\n\nb"), user("c"), assistant("d")],
    "not closed": [user("a"), assistant("<think>\nx"), user("c"), assistant("d")],
    "of the user": [user("<think>\nx\n</think>\n\nb"), assistant("c"), user("</think>")],
    "apart": [
        *(user("a"), assistant("b", reasoning_content="x\n"), user("c")),
        assistant("d", reasoning_content="\ny"),
    ],
    "before a call": [
        *(user("a"), assistant("<think>\nx\n</think>\n\n", tool_calls=[call()]), result("r")),
        *(assistant("b"), user("c"), assistant("<think>\ny\n</think>\n\nd")),
    ],
    "between calls": [
        *(user("a"), assistant("<think>\nx\n</think>\n\n", tool_calls=[call()]), result("r")),
        *(assistant("", tool_calls=[call()]), result("s")),
        assistant("<think>\ny\n</think>\n\nd"),
    ],
    "results in the user's words": [
        *(user("a"), assistant("<think>\nx\n</think>\n\nb")),
        user("<tool_response>\nr\n</tool_response>"),
        *(assistant("<think>\ny\n</think>\n\nd"), user("e"), assistant("f")),
    ],
}
THINKING = [name for name, family in FAMILIES.items() if "think" in family.has]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "lines merge", "metaspace", "NFC"])
@pytest.mark.parametrize("family", THINKING)
def test_reasoning_trains_where_inference_emits_it(subject, family, kind, empty):
    one = subject(family, kind)
    encoder = one.encoder(train_empty_think=empty)
    for messages in THOUGHTS.values():
        check_truth(one, messages, None)
        (examples,) = encoder.encode([Conversation(messages, None)])
        check(one, messages, None, examples, empty=empty)


def test_a_conversation_whose_reasoning_is_stripped_becomes_two_examples(subject):
    one = subject("qwen3")
    (examples,) = one.encoder().encode([Conversation(THOUGHTS["both"], None)])
    assert [one.decode(e.ids[r]) for e in examples for r in trained_runs(e)] == [
        "<think>\nx y\n</think>\n\nb<|im_end|>",
        "<think>\nz\n</think>\n\nd<|im_end|>",
    ]
    assert one.decode(examples[1].ids).startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_the_empty_think_block_is_context_unless_asked_for(subject):
    one = subject("qwen3")
    item = Conversation([user("a"), assistant("b")], None)
    for empty, trained in ((False, "b<|im_end|>"), (True, "<think>\n\n</think>\n\nb<|im_end|>")):
        ((example,),) = one.encoder(train_empty_think=empty).encode([item])
        assert [one.decode(example.ids[r]) for r in trained_runs(example)] == [trained]
        assert "<think>\n\n</think>\n\nb" in one.decode(example.ids)


@pytest.mark.parametrize("empty", [False, True])
def test_a_block_that_the_prompt_already_holds_never_trains(subject, empty):
    one = subject("qwen3")
    encoder = one.encoder(template_args={"enable_thinking": False}, train_empty_think=empty)
    items = [[user("a"), assistant("b")], [user("a"), assistant("<think>\nx\n</think>\n\nb")]]
    told, thinks = encoder.encode([Conversation(messages, None) for messages in items])
    check(one, items[0], None, told)
    assert isinstance(thinks, str)


@pytest.mark.parametrize("kind", ["bytes", "lines merge", "NFC"])
@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_that_the_template_strips_trains_behind_the_prompt_or_is_refused(
    subject, kind, name
):
    one, messages = subject(chat_templates.R1_FAMILY, kind), THOUGHTS[name]
    (examples,) = one.encoder().encode([Conversation(messages, None)])
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    clean = re.compile(r"<think>\n[^<]+</think>[^<]*")
    if not all(clean.fullmatch(messages[n]["content"]) for n in answers):
        if isinstance(examples, str):
            return
    assert not isinstance(examples, str), examples
    assert len(examples) == len(answers)
    for number, example in zip(answers, examples, strict=True):
        prompt = reference(one, messages[:number], None, prompt=True)
        (run,) = trained_runs(example)
        assert one.decode(example.ids[: run.start]) == prompt
        thought, words = chat_templates.split_thought(messages[number])
        emitted = one.decode(example.ids[run])
        assert emitted.endswith("<｜end▁of▁sentence｜>")
        assert chat_templates.squeeze(emitted) == chat_templates.squeeze(
            f"{thought}</think>{words}<｜end▁of▁sentence｜>"
        )
        if "reasoning_content" not in messages[number]:
            assert messages[number]["content"].endswith(emitted.removesuffix(one.family.eos))


def test_an_answer_without_reasoning_is_refused_where_the_prompt_opens_it(subject):
    one = subject(chat_templates.R1_FAMILY)
    for answer in ("b", "", "<think>", "</think", "<think>\nx"):
        (examples,) = one.encoder().encode([Conversation([user("a"), assistant(answer)], None)])
        assert isinstance(examples, str)


# ---- templates that must not train -------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_template_that_does_not_print_the_conversation_is_refused(subject, hostile):
    one = subject(dataclasses.replace(FAMILIES["chatml"], source=HOSTILE[hostile]))
    long = "say hello, please, and say it more than once: " * 3
    texts = {
        "plain": ("say hello", "hello you"),
        "thinking": ("say hello", "<think>\nhm\n</think>\n\nhello you"),
        "echo": ("hello", "hello"),
        "long echo": (long, long),
        "echo behind": (long, f"You said: {long}"),
    }
    for question, answer in texts.values():
        turn = [user(question), assistant(answer)]
        for messages in (turn, turn * 2, [system("Be brief."), *turn * 2]):
            assert reason_for(one, Conversation(messages, None)), (question, len(messages))


def reason_for(one: Subject, item: Conversation) -> str:
    """Why a conversation, or the template as a whole, is refused; "" = it is not."""
    try:
        (found,) = one.encoder().encode([item])
    except ValueError as error:
        return str(error)
    return found if isinstance(found, str) else ""


@pytest.mark.parametrize("number", range(4))
def test_a_message_that_the_template_skips_is_missed_even_if_it_stands_elsewhere(subject, number):
    # Five messages in which every text occurs more than once.
    text = "the same words again and again, so many that no one could take them for others"
    skip = f"{{% for message in messages %}}{{% if loop.index0 != {number} %}}"
    source = FAMILIES["tag with end"].source.replace("{% generation %}", "")
    source = source.replace("{% endgeneration %}", "")
    assert source.count("{% for message in messages %}") == source.count("{% endfor %}") == 1
    source = source.replace("{% for message in messages %}", skip)
    source = source.replace("{% endfor %}", "{% endif %}{% endfor %}")
    one = subject(dataclasses.replace(FAMILIES["tag with end"], source=source))
    for words in (text, "yes"):
        item = Conversation(
            [system(words), user(words), assistant(words), user(words), assistant(words)], None
        )
        assert reason_for(one, item)


def test_an_end_of_turn_that_is_no_special_token_is_refused(subject):
    family = FAMILIES["chatml"]
    control = tuple(token for token in family.control if token != "<|im_end|>")
    one = subject(
        dataclasses.replace(
            family, control=control, eos="<|endoftext|>", source=family.source + " "
        )
    )
    (examples,) = one.encoder().encode([Conversation([user("a"), assistant("b")], None)])
    assert isinstance(examples, str)


def test_a_system_text_that_the_answer_takes_away_trains_behind_the_prompt_or_is_refused(subject):
    # Mistral 7B v0.3 prints it only while the user's message is the last one.
    one = subject(dataclasses.replace(FAMILIES["mistral7"], source=chat_templates.MISTRAL3))
    messages = [system("Be brief."), user("a"), assistant("b")]
    prompt = reference(one, messages[:2], None, prompt=True)
    assert "Be brief." in prompt and "Be brief." not in reference(one, messages, None)
    (examples,) = one.encoder().encode([Conversation(messages, None)])
    if not isinstance(examples, str):
        (example,) = examples
        assert one.decode(example.ids) == prompt + " b</s>"
    (examples,) = one.encoder().encode([Conversation(messages[1:], None)])
    check(one, messages[1:], None, examples)


# ---- the user ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    tiers.crossed(FAMILIES, ["bytes", "lines merge", "NFC", "rstrip", "metaspace", "legacy"]),
)
def test_no_token_of_the_user_trains_whatever_the_user_writes(subject, family, kind):
    one = subject(family, kind)
    control = (one.family.bos, *one.family.control)
    whole = joined(one.family.pieces([user("ΩQ"), assistant("ΩA"), user("ΩR")], None, False))
    texts = ["Ω".join(control), whole, whole * 2, *(f"{token}Ω{token}" for token in control)]
    texts += ["\nΩ\n", "assistant\nΩ", "<think>Ω</think>Ω"]
    items = []
    for text in texts:
        items.append(Conversation([user(text), assistant("no"), user(text), assistant("n")], None))
    for item, examples in zip(items, one.encoder().encode(items), strict=True):
        assert not isinstance(examples, str), (item, examples)
        trained = [one.decode(e.ids[run]) for e in examples for run in trained_runs(e)]
        assert len(trained) == 2 and "Ω" not in "".join(trained)
        assert [len(text) < 60 for text in trained] == [True, True]


# ---- special tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes, pad is eos", "bytes, adds BOS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_trains_once_per_turn_and_bos_stands_once(subject, family, kind):
    one = subject(family, kind)
    if one.kind.pad_is_eos:
        assert one.tokenizer.pad_token_id == one.tokenizer.eos_token_id
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (examples,) = one.encoder().encode([Conversation(messages, None)])
    special = one.tokenizer.added_tokens_decoder
    ends = [[i for i in e.ids[run] if i in special] for e in examples for run in trained_runs(e)]
    emission = joined(
        [piece for piece in one.family.pieces(messages, None, False) if piece[0] == 3]
    )
    assert [[one.decode(end)] for end in ends] == [[emission.strip().removeprefix("d")]] * 2
    if bos := one.tokenizer.bos_token_id:
        assert all((e.ids == bos).tolist() == [True] + [False] * (len(e.ids) - 1) for e in examples)


@pytest.mark.parametrize("kind", KINDS)
def test_of_plain_text_the_completion_and_one_end_train_behind_one_bos(subject, kind):
    one = subject("mistral1", kind)
    tokenizer = one.tokenizer
    bos = [tokenizer.bos_token_id] if one.kind.adds_bos else []
    pairs = [
        *(("Q: x\nA:", " yes"), ("Q: x\nA: ", "yes"), ("x\n", "\nyes\n"), ("x:  ", "12")),
        *(("the", "yes"), ("", "hello"), ("", " \n hello"), ("é", "\u0301 日本"), ("x", "  ")),
    ]
    for (prompt, completion), examples in zip(
        pairs, one.encoder().encode([Text(*pair) for pair in pairs]), strict=True
    ):
        if isinstance(examples, str):
            assert one.kind.changes in ("bytes", "normal form"), examples
            continue
        (example,) = examples
        ids, weights = example.ids.tolist(), example.weights.tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[: len(bos)] == bos and ids.count(tokenizer.bos_token_id) == len(bos)
        start = len(bos) + len(prompt_ids(one, prompt)) if prompt else 0
        assert weights == [0.0] * start + [1.0] * (len(ids) - start)
        if prompt:
            assert ids[:start] == bos + prompt_ids(one, prompt)
        whole, before = one.decode(ids[len(bos) :]), one.decode(ids[len(bos) : start])
        emitted = whole.removeprefix(before)
        assert given_back(one, emitted) == given_back(one, f"{completion}</s>")


def test_an_end_that_the_text_already_has_is_not_added_again(subject):
    one = subject("mistral1", "bytes, adds BOS")
    ((example,),) = one.encoder().encode([Text("<s>a", "b</s>")])
    assert one.decode(example.ids) == "<s>ab</s>"
    assert texts_trained(one, example) == ["b</s>"]


def test_the_template_for_tools_is_taken_where_there_are_tools(subject):
    one = subject("qwen3")
    tokenizer = copy.deepcopy(one.tokenizer)
    tokenizer.chat_template = {"default": chat_templates.CHATML, "tool_use": chat_templates.QWEN3}
    encoder = encoding.Encoder(tokenizer, encoding.Options(date=DATE))
    messages = [system("S"), user("a"), assistant("", tool_calls=[call(x=1)])]
    with_tools, without = encoder.encode(
        [Conversation(messages, [WEATHER]), Conversation(messages, None)]
    )
    check(one, messages, [WEATHER], with_tools)
    assert isinstance(without, str), "the default template prints no calls"
    plain = [user("a"), assistant("b")]
    (found,) = encoder.encode([Conversation(plain, None)])
    check(dataclasses.replace(one, family=FAMILIES["chatml"]), plain, None, found)


# ---- options -----------------------------------------------------------------------------------

ROUNDS = [
    *(system("S"), user("a"), assistant("b"), user("c"), assistant("d")),
    *(user("e"), assistant("f g"), user("h")),
]
WITH_SYSTEM = [name for name, family in FAMILIES.items() if "system" in family.has]


@pytest.mark.parametrize(
    ("turns", "trained"),
    [
        *(("all", [2, 4, 6]), ("last", [6]), ("from:1", [2, 4, 6]), ("from:2", [4, 6])),
        *(("from:3", [6]), ("from:4", []), ("from:99", [])),
    ],
)
@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_the_turns_that_are_asked_for_train(subject, family, turns, trained):
    one = subject(family)
    (examples,) = one.encoder(turns=turns).encode([Conversation(ROUNDS, None)])
    check(one, ROUNDS, None, examples, dict.fromkeys(trained, 1.0))


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_a_message_says_how_much_it_trains(subject, family):
    one, messages = subject(family), [dict(message) for message in ROUNDS]
    messages[2] |= {"train": False}
    messages[4] |= {"weight": 0.25}
    messages[6] |= {"train": True}
    plain = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]
    for turns, weights in (
        ("all", {4: 0.25, 6: 1.0}),
        ("last", {6: 1.0}),
        ("from:1", {4: 0.25, 6: 1.0}),
    ):
        (examples,) = one.encoder(turns=turns).encode([Conversation(messages, None)])
        check(one, plain, None, examples, weights)
    messages[4] |= {"weight": 0.0}
    messages[6] = messages[6] | {"weight": 2.5}
    del messages[6]["train"]
    (examples,) = one.encoder().encode([Conversation(messages, None)])
    check(one, plain, None, examples, {6: 2.5})
    assert messages[2]["train"] is False, "the caller's messages stay as they were"


def test_an_answer_that_does_not_train_may_be_what_could_not_train(subject):
    one = subject("llama31")
    messages = [user("a"), assistant("Wait.", tool_calls=[call()]), result("r"), assistant("b")]
    (examples,) = one.encoder().encode([Conversation(messages, None)])
    assert isinstance(examples, str)


# ---- the date ----------------------------------------------------------------------------------


def test_the_date_is_the_option_and_not_today(subject):
    one = subject("llama31")
    item = Conversation([user("a"), assistant("b")], None)
    for date, printed in ((DATE, "03 Feb 2025"), ("2031-12-31", "31 Dec 2031")):
        ((example,),) = one.encoder(date=date).encode([item])
        assert f"Today Date: {printed}\n\n<|eot_id|>" in one.decode(example.ids)
    clock = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}"
    of = dataclasses.replace(FAMILIES["chatml"], source=clock + FAMILIES["chatml"].source)
    one = subject(of)
    first, second = (one.encoder().encode([item])[0][0] for _ in range(2))
    assert one.decode(first.ids).startswith(f"{DATE} 00:00:00.000000<|im_start|>")
    assert first.ids.tolist() == second.ids.tolist()


def test_a_variable_of_the_template_goes_before_the_date(subject):
    one = subject("llama31")
    encoder = one.encoder(template_args={"date_string": "1 May 1999"})
    ((example,),) = encoder.encode([Conversation([user("a"), assistant("b")], None)])
    assert "Today Date: 1 May 1999\n\n" in one.decode(example.ids)


# ---- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"), tiers.crossed(FAMILIES, ["bytes", "lines merge", "legacy"])
)
def test_a_batch_is_its_items_one_by_one_and_the_same_each_time(subject, family, kind):
    one = subject(family, kind)
    items = [Conversation(*pair) for pair in all_conversations(one.family).values()]
    items[3:3] = [Conversation([user("\ud800"), assistant("a")], None)]
    before = json.dumps([dataclasses.asdict(item) for item in items])

    def plain(found):
        return (
            found
            if isinstance(found, str)
            else [(e.ids.tolist(), e.weights.tolist()) for e in found]
        )

    batch = [plain(found) for found in one.encoder().encode(items)]
    encoder = one.encoder()
    assert [plain(encoder.encode([item])[0]) for item in items] == batch
    assert [plain(found) for found in encoder.encode(items[::-1])] == batch[::-1]
    assert any(isinstance(found, str) for found in batch)
    assert json.dumps([dataclasses.asdict(item) for item in items]) == before
    assert encoder.encode([]) == []


HALF = "\ud83d"


@pytest.mark.parametrize(
    "item",
    [
        Conversation([user(HALF), assistant("a")], None),
        Conversation([user("a"), assistant(f"b{HALF}c")], None),
        Conversation([system(HALF), user("a"), assistant("b")], None),
        Conversation([user("a"), assistant("", tool_calls=[call(x=HALF)])], None),
        Conversation([user("a"), assistant("", tool_calls=[call(**{HALF: 1})])], None),
    ],
)
def test_half_a_character_is_refused(subject, item):
    (examples,) = subject("qwen3").encoder().encode([item])
    assert isinstance(examples, str) and "surrogate" in examples


# ---- too long ------------------------------------------------------------------------------------


def exchanges(family: Family) -> Example:
    """A conversation of several exchanges, with what must stay when it is shortened."""
    messages = [system("Stay.")] if "system" in family.has else []
    for number in range(5):
        messages += [user(f"question {number} " + "why " * number), assistant(f"it is {number}")]
        if "tools" in family.has and number % 2:
            called = assistant("", tool_calls=[call(n=number)])
            messages += [user(f"call {number}"), called, result(f"r{number}"), assistant("done")]
    return messages, [WEATHER] if "tools" in family.has else None


def shortened(messages: Messages, num_cut: int) -> Messages:
    """The conversation from a user's message on; what stands before the first user stays."""
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[0]] + messages[users[num_cut] :]


def texts_trained(subject: Subject, example: Encoded) -> list[str]:
    return [subject.decode(example.ids[run]) for run in trained_runs(example)]


# The others reason and call tools as "qwen3 thinking" does.
@pytest.mark.parametrize(
    "family", [tiers.full(name) if name in ("qwen3", "mistral7") else name for name in FAMILIES]
)
def test_a_conversation_that_is_too_long_is_that_without_its_oldest_turns(subject, family):
    one = subject(family)
    messages, tools = exchanges(one.family)
    item = Conversation(messages, tools)
    encoder = one.encoder()
    (examples,) = encoder.encode([item])
    assert not isinstance(examples, str)

    def text_of(messages: Messages) -> str:
        return joined(one.family.pieces(messages, tools, False))

    def length(messages: Messages) -> int:
        (found,) = encoder.encode([Conversation(messages, tools)])
        return len(found[-1].ids)

    prefixes = {text_of(messages[: n + 1]): messages[: n + 1] for n in range(1, len(messages))}
    kept = []  # of each example, which is the conversation up to some message: all its cuts
    for example in examples:
        own = prefixes[one.decode(example.ids)]
        num_users = sum(message["role"] == "user" for message in own)
        cut = [shortened(own, num_cut) for num_cut in range(num_users)]
        kept.append([(text_of(left), length(left)) for left in cut])
    cuts = Counter()
    for limit in {1, *(length + more for _, length in kept[-1] for more in (-1, 0))}:
        (shorter,) = one.encoder(max_tokens=limit).encode([item])
        for found, example, texts in zip(shorter, examples, kept, strict=True):
            # Where even the last exchange is too long, it stays as it is: too long.
            fits = [n for n, (_, length) in enumerate(texts) if length <= limit] or [len(texts) - 1]
            assert isinstance(found, Encoded)
            assert (one.decode(found.ids), found.num_cut) == (texts[fits[0]][0], fits[0])
            # What is left trains as before.
            left, trained = texts_trained(one, found), texts_trained(one, example)
            assert left and left == trained[-len(left) :]
            cuts[fits[0]] += 1
    assert len(cuts) >= 5


def test_turns_that_do_not_train_still_do_not_in_a_shorter_conversation(subject):
    one = subject("chatml")
    messages = [*ROUNDS[:4], assistant("d", weight=0.5), user("e"), assistant("f", train=False)]
    messages += [user("g"), assistant("h")]
    item = Conversation(messages, None)
    ((whole,),) = one.encoder().encode([item])
    ((short,),) = one.encoder(max_tokens=len(whole.ids) - 1).encode([item])
    assert short.num_cut == 1 and texts_trained(one, short) == ["d<|im_end|>", "h<|im_end|>"]
    weights = [set(short.weights[run].tolist()) for run in trained_runs(short)]
    assert weights == [{0.5}, {1.0}]
    ((short,),) = one.encoder(turns="last", max_tokens=len(whole.ids) - 1).encode([item])
    assert short.num_cut == 1 and texts_trained(one, short) == ["h<|im_end|>"]
    ((short,),) = one.encoder(turns="from:2", max_tokens=len(short.ids)).encode([item])
    assert short.num_cut == 1 and texts_trained(one, short) == ["d<|im_end|>", "h<|im_end|>"]


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_what_is_shortened_fits_although_cutting_tokens_makes_more_of_them(subject, kind):
    one = subject("chatml", kind)
    messages = [turn for n in range(4) for turn in (user(f"a{n}"), assistant("\n\n"))]
    ((whole,),) = one.encoder(turns="last").encode([Conversation(messages, None)])
    pieces = one.family.pieces(messages, None, False)
    assert len(whole.ids) > len(prompt_ids(one, joined(pieces))), "no token crosses an edge"
    for limit in range(len(whole.ids) - 20, len(whole.ids) + 1):
        ((found,),) = one.encoder(turns="last", max_tokens=limit).encode(
            [Conversation(messages, None)]
        )
        assert len(found.ids) <= limit
        assert (found.num_cut == 0) == (limit == len(whole.ids))


def test_what_fits_is_not_shortened(subject):
    one = subject("llama31")
    item = Conversation(*exchanges(one.family))
    ((whole,),) = one.encoder().encode([item])
    ((found,),) = one.encoder(max_tokens=len(whole.ids)).encode([item])
    assert found.num_cut == 0 and found.ids.tolist() == whole.ids.tolist()


# ---- any conversation ----------------------------------------------------------------------------

BITS = [
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\xa0", "\u2028", "\u200f", "\x00", "\x1c", "\x85"),
    *(
        "a",
        "b",
        "yes",
        "yes",
        "assistant",
        "user\n",
        ": ",
        "12",
        "{{",
        "{% x",
        "[INST]",
        "<0x0A>",
        "▁",
    ),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "👩‍👩‍👧‍👦",
        "🏽",
        "مرحبا",
        "日本",
        "\ufeff",
        "ﬁ",
        "\U000e0001",
        "\uffff",
    ),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", "<tool_response>", "</tool_response>"),
]
CHARACTERS = st.characters(exclude_categories=["Cs"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(['"\\', "ø\n", "</s>", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["k", "ключ", "日 本", "é\u0301"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def conversations(draw, family: Family) -> Example:
    control = [token for token in (family.bos, *family.control) if token]
    text = st.one_of(
        st.lists(st.sampled_from(BITS + control), max_size=6).map("".join),
        st.text(CHARACTERS, max_size=8),
        st.sampled_from(["yes", "", "Hello there.", "<think>\nhm\n</think>\n\nyes", "word " * 300]),
    )

    def rounds() -> Messages:
        turn = [user(draw(text))]
        if "free" in family.has and draw(st.integers(0, 9)) == 0:
            turn.append(draw(st.sampled_from([user, assistant, system]))(draw(text)))
            turn += [result(draw(text).strip() or "r")] * draw(st.integers(0, 1))
        if "results" in family.has and draw(st.integers(0, 3)) == 0:
            names = st.sampled_from(["get_weather", "f", "größe", "yes"])
            keys = st.sampled_from(["k", "ключ", "x y", "yes"])
            num_calls = draw(st.integers(0, 2)) if family.has & {"tools", "calls"} else 0
            calls = [
                call(draw(names), **draw(st.dictionaries(keys, JSON, max_size=2)))
                for _ in range(num_calls)
            ]
            words = draw(text) if "mixed" in family.has and draw(st.booleans()) else ""
            turn.append(assistant(words, **({"tool_calls": calls} if calls else {})))
            turn += [result(draw(text)) for _ in range(draw(st.integers(1, 2)))]
        answer = assistant(draw(text))
        if "think" in family.has and draw(st.integers(0, 4)) == 0:
            answer["reasoning_content"] = draw(text)
        return [*turn, answer]

    messages = [system(draw(text))] if "system" in family.has and draw(st.booleans()) else []
    messages += [message for _ in range(draw(st.integers(1, 3))) for message in rounds()]
    if draw(st.integers(0, 9)) == 0:
        messages.append(user(draw(text)))
    has_tools = "tools" in family.has and draw(st.booleans())
    return messages, [WEATHER] if has_tools else None


@pytest.mark.parametrize(
    "family",
    tiers.fast(["chatml", "qwen3 thinking", "mistral7", "llama31", "deepseek3"], FAMILIES),
)
def test_any_conversation_trains_as_the_ground_truth_says_or_is_refused(subject, family):
    kinds = [
        "bytes",
        "lines merge",
        "trim offsets",
        "NFC",
        "rstrip",
        "gemma",
        "metaspace",
        "legacy",
    ]
    encoders = {kind: subject(family, kind).encoder() for kind in kinds}
    outcomes = Counter()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(conversations(FAMILIES[family]), st.sampled_from(kinds))
    def check_one(example, kind):
        one, (messages, tools) = subject(family, kind), example
        (examples,) = encoders[kind].encode([Conversation(messages, tools)])
        if refused(one.family, messages, tools):
            outcomes["must be refused"] += 1
            assert isinstance(examples, str)
            return
        check_truth(one, messages, tools)
        if isinstance(examples, str) and may_be_refused(one, messages, tools):
            outcomes["may be refused"] += 1
            return
        check(one, messages, tools, examples)
        outcomes["trains"] += 1

    check_one()
    assert outcomes["trains"] > sum(outcomes.values()) / 2, outcomes


NUM_EXAMPLES = 60


# ---- the real tokenizers and data ----------------------------------------------------------------


def qwen25(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    """The turns of Qwen2.5; what it says of the system and the tools is not written out here."""

    def emit(number: int, message: dict) -> list[Piece]:
        return [(number, chat_templates.qwen_calls(message, message["content"]) + "<|im_end|>")]

    return chat_templates.qwen_turns(messages, emit)


def real_qwen3(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    return chat_templates.qwen3_turns(messages, empty, "")


def smollm2(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
    if tools or any(message.get("tool_calls") for message in messages):
        raise Refused("tools are left out")
    return chat_templates.chatml(messages, tools, empty)[messages[0]["role"] != "system" :]


REAL = {"qwen2_5": qwen25, "qwen3": real_qwen3, "smollm2": smollm2}


@pytest.fixture(scope="session")
def real():
    """A tokenizer of shared/tokenizers; the words of its system prompt are its own."""
    loaded: dict[str, Subject] = {}

    def real(name: str) -> Subject:
        folder = SHARED / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"the tokenizer {folder} is not on this machine")
        if name not in loaded:
            tokenizer = encoding.load_tokenizer(folder)
            turns = REAL[name]

            def pieces(messages: Messages, tools: Tools, empty: bool) -> list[Piece]:
                printed = turns(messages, tools, empty)
                whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
                assert whole.endswith(joined(printed))
                head = whole.removesuffix(joined(printed))
                return [(None, head), *printed]

            family = Family("", pieces, (), tokenizer.eos_token)
            kind = dataclasses.replace(KINDS["NFC" if name != "smollm2" else "bytes"])
            loaded[name] = Subject(name, tokenizer, family, kind, full_offsets(tokenizer))
        return loaded[name]

    return real


def rows_of(file: str, limit: int | None) -> list[Example]:
    """Rows of shared/data as conversations, read without the package under test."""
    path = SHARED / "data" / file
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    found: list[Example] = []
    for row in itertools.islice(rows, limit):
        if "messages" in row:
            found.append((row["messages"], row["tools"]))
        elif "question" in row:
            found.append(([user(row["question"]), assistant(row["answer"])], None))
        else:
            asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            found.append(([user(asked), assistant(row["response"])], None))
    return found


FILES = ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "code_instructions.json", "tool_calls.jsonl"]


def check_rows(one: Subject, examples: list[Example]) -> Counter:
    outcomes = Counter()
    encoder = one.encoder()
    for start in range(0, len(examples), 200):
        part = examples[start : start + 200]
        found = encoder.encode([Conversation(*pair) for pair in part])
        for (messages, tools), encoded in zip(part, found, strict=True):
            if refused(one.family, messages, tools):
                outcomes["refused"] += 1
                assert isinstance(encoded, str)
                continue
            check(one, messages, tools, encoded)
            outcomes["trains"] += 1
            outcomes["examples"] += len(encoded)
    return outcomes


@pytest.mark.parametrize(
    ("name", "file"),
    tiers.fast(
        [("qwen3", "tool_calls.jsonl"), ("smollm2", "tool_calls.jsonl")],
        itertools.product(REAL, FILES),
    ),
)
def test_the_first_rows_of_real_data_train_token_by_token(real, name, file):
    examples = rows_of(file, 50)
    outcomes = check_rows(real(name), examples)
    assert outcomes["trains"] + outcomes["refused"] == len(examples)
    assert (outcomes["refused"] > 0) == ((name, file) == ("smollm2", "tool_calls.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", REAL)
def test_all_real_data_trains_token_by_token(real, name, file):
    examples = rows_of(file, None)
    outcomes = check_rows(real(name), examples)
    assert outcomes["trains"] + outcomes["refused"] == len(examples)
    assert (outcomes["refused"] > 0) == ((name, file) == ("smollm2", "tool_calls.jsonl"))


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    tiers.fast([("qwen3", 24), ("smollm2", 0)], itertools.product(REAL, [0, 24])),
)
def test_answers_behind_a_blank_train_behind_the_tokens_that_inference_gives(
    real, name, max_tokens
):
    tokenizer = copy.deepcopy(real(name).tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    answers = ["hello there", "\n\nfine", "12", " two", "x"]
    messages = [turn for n, text in enumerate(answers) for turn in (user(f"q{n}"), assistant(text))]
    options = encoding.Options(max_tokens=max_tokens)
    (examples,) = encoding.Encoder(tokenizer, options).encode([Conversation(messages, None)])
    trained = []
    for example in examples:
        assert isinstance(example, Encoded) and len(example.ids) <= (max_tokens or 99)
        for run in trained_runs(example):
            text = tokenizer.decode(example.ids[run]).removesuffix("<|im_end|>")
            prompt = messages[2 * example.num_cut : 2 * answers.index(text) + 1]
            given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            assert example.ids[: run.start].tolist() == given
            trained.append(text)
    # A turn that needs no cut may be left out of the last text, where that is too long.
    assert sorted(trained) == sorted(set(answers) & set(trained) if max_tokens else answers)
    assert len(trained) >= 3
