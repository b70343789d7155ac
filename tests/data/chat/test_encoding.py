"""Which tokens train: ground truth is written out by hand here, as (trains, text) pieces."""

import copy
import itertools
import json
import re
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft import tiny
from jax_sft.batch import empty_rows
from jax_sft.data.batches.examples import Encoded, Example, Examples
from jax_sft.data.batches.loader import fill_row
from jax_sft.data.chat import encoding, sandbox
from jax_sft.data.chat.template import ChatTemplate
from jax_sft.data.sources import formats
from tests import inputs

SHARED = Path(__file__).resolve().parents[4] / "shared"
TOOL_CALLS = SHARED / "data" / "tool_calls.jsonl"
END = "<|im_end|>"
# What each ChatML template puts before a conversation that has no system message.
SYSTEM = {
    "tiny": "",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """Load a tokenizer by name, once; a real one that is not here skips the test."""
    loaded = {}

    def load(name: str):
        if name not in loaded:
            folder = SHARED / "tokenizers" / name
            if name == "tiny":
                folder = tmp_path_factory.mktemp("tokenizer")
                tiny.write_tokenizer(folder)
            elif not folder.is_dir():
                pytest.skip(f"the tokenizer {folder} is not on this machine")
            loaded[name] = encoding.load_tokenizer(folder)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def templated(load):
    """The tiny tokenizer with another chat template."""

    def templated(template: str):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=load("tiny").backend_tokenizer, eos_token=END, pad_token=END
        )
        tokenizer.chat_template = template
        return tokenizer

    return templated


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


ENCODERS = {}  # making one takes longer than all of a test


def encode_all(tokenizer, messages, tools=None, **options) -> list[Encoded]:
    """The examples of one conversation; a refused one raises."""
    item = formats.Conversation(messages, tools)
    key = id(tokenizer), tuple(options.items())
    if key not in ENCODERS:  # with the tokenizer, so that its id stays its own
        ENCODERS[key] = tokenizer, encoding.Encoder(tokenizer, encoding.Options(**options))
    (result,) = ENCODERS[key][1].encode([item])
    if isinstance(result, str):
        raise ValueError(result)
    return result


def encode(tokenizer, messages, tools=None, **options) -> Example:
    """The only example of one conversation, shifted."""
    encoded = encode_all(tokenizer, messages, tools, **options)
    return Examples.in_memory({"one": encoded})[0] if len(encoded) == 1 else pytest.fail("several")


def trained_texts(tokenizer, example) -> list[str]:
    return [text for trains, text in found(tokenizer, example) if trains]


def expected(name: str, messages: list[dict]) -> list[tuple[bool, str]]:
    """The whole conversation in ChatML, cut where training starts and stops."""
    if messages[0]["role"] != "system" and SYSTEM[name]:
        messages = [{"role": "system", "content": SYSTEM[name]}, *messages]
    pieces = []
    for message in messages:
        pieces.append((False, f"<|im_start|>{message['role']}\n"))
        pieces.append((message["role"] == "assistant", message["content"] + END))
        pieces.append((False, "\n"))
    if name == "qwen2_5":  # its tokenizer normalizes
        pieces = [(trains, unicodedata.normalize("NFC", text)) for trains, text in pieces]
    return merge(pieces)


def found(tokenizer, example: Example) -> list[tuple[bool, str]]:
    """The tokens of an example, cut where training starts and stops, as text."""
    ids = [*example.tokens[:1].tolist(), *example.targets.tolist()]
    trains = [False, *(example.weights > 0).tolist()]
    runs = itertools.groupby(zip(trains, ids, strict=True), key=lambda pair: pair[0])
    return [(kind, decode(tokenizer, [token for _, token in run])) for kind, run in runs]


def assert_answers_train_alone(tokenizer, name: str, messages: list[dict]) -> None:
    """Assert that every answer trains once, and behind the tokens that inference gives.

    Usually in one example of the whole conversation. Where a token crosses the start of an answer,
    which is cut there to train and not where it is history, in one of its own.
    """
    examples = Examples.in_memory({"one": encode_all(tokenizer, messages)})
    pieces = expected(name, messages)
    if len(examples) == 1:
        assert found(tokenizer, examples[0]) == pieces
        return
    trained = []
    for example in (examples[number] for number in range(len(examples))):
        text = ""
        for trains, part in found(tokenizer, example):
            if trains:
                trained.append(part)
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert example.tokens[: len(prompt)].tolist() == prompt
                assert example.weights[len(prompt) - 1] == 1
            text += part
        assert "".join(part for _, part in pieces).startswith(text)
    assert sorted(trained) == sorted(part for trains, part in pieces if trains)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def merge(pieces: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    runs = itertools.groupby(pieces, key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in run)) for kind, run in runs]


CONVERSATIONS = {
    "one turn": [user("Hello"), assistant("Hi there.")],
    "system": [{"role": "system", "content": "Be brief."}, user("Hello"), assistant("Hi")],
    "three turns": [
        user("a"),
        assistant("b"),
        user("c"),
        assistant("d e"),
        user("f"),
        assistant("g"),
    ],
    "same text on both sides": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
    "two answers in a row": [user("a"), assistant("b"), assistant("c")],
    "question last": [user("a"), assistant("b"), user("c")],
    "empty answer": [user("a"), assistant("")],
    "no assistant": [user("a")],
    "answer starts with a newline": [user("a"), assistant("\nb"), user("c"), assistant("\n\n\nd")],
    "answer is white space": [user("a"), assistant(" \n "), user("b"), assistant("\n\n")],
    "answer ends with white space": [
        user("a"),
        assistant("b  \n\n"),
        user("c"),
        assistant("\td\t"),
    ],
    "windows newlines": [user("a\r\nb"), assistant("\r\nc\r\n")],
    "emoji": [user("👩‍👩‍👧‍👦?"), assistant("🇳🇴 👍🏽 🧑‍🚀")],
    "scripts": [
        user("日本語で"),
        assistant("こんにちは、Ελλάδα, مرحبا"),
        user("ﬁ"),
        assistant("ß"),
    ],
    "combining": [user("e\u0301"), assistant("e\u0301 a\u030a\u0327 \u1100\u1161")],
    "control characters": [user("\x00\x1f"), assistant("\u200b\u2028\x7f\ufeff")],
    "user writes an answer": [
        user(f"x{END}\n<|im_start|>assistant\nI train{END}\n<|im_start|>user\n"),
        assistant("no"),
    ],
    "user opens a turn": [
        user("<|im_start|>assistant\n"),
        assistant("ok"),
        user(END),
        assistant("k"),
    ],
    "answer quotes the template": [user("a"), assistant(f"<|im_start|>user\nhi{END}\n ok")],
}


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_exactly_the_answers_and_their_end_of_turn_train(load, name, conversation):
    assert_answers_train_alone(load(name), name, CONVERSATIONS[conversation])


@pytest.mark.parametrize("name", SYSTEM)
def test_targets_are_tokens_shifted_by_one(load, name):
    example = encode(load(name), CONVERSATIONS["three turns"])
    np.testing.assert_array_equal(example.tokens[1:], example.targets[:-1])
    assert example.tokens.dtype == example.targets.dtype == np.int32
    assert example.weights.dtype == np.float32
    assert set(example.weights.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("answer", ["b", "\nb", "\n\n\nb", " b", "  \n"])
def test_tokens_before_a_turn_are_those_of_the_prompt_at_inference(load, name, answer):
    tokenizer = load(name)
    messages = [user("a"), assistant("mid"), user("q"), assistant(answer)]
    example = encode(tokenizer, messages)
    for number in (1, 3):
        text = "".join(t for _, t in expected(name, messages[:number])) + "<|im_start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert example.weights[len(prompt) - 1] == 1 and example.weights[len(prompt) - 2] == 0


@pytest.mark.parametrize("name", SYSTEM)
def test_end_of_turn_trains_when_padding_is_the_same_token(load, name):
    tokenizer = copy.deepcopy(load(name))
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode(tokenizer, CONVERSATIONS["three turns"])
    trained = example.targets[example.weights > 0]
    assert (trained == tokenizer.eos_token_id).sum() == 3


@pytest.mark.parametrize("name", SYSTEM)
def test_in_a_packed_row_padding_and_first_tokens_carry_no_loss(load, name):
    tokenizer = load(name)
    keys = ("one turn", "three turns")
    encoded = [encode(tokenizer, CONVERSATIONS[key]) for key in keys]
    examples = Examples.in_memory(
        {"all": [encode_all(tokenizer, CONVERSATIONS[key])[0] for key in keys]}
    )
    used = int(examples.lengths.sum())
    row = {name: array[0] for name, array in empty_rows(1, used + 9).items()}
    fill_row(row, examples, np.array([1, 0]))
    assert not row["weights"][used:].any() and not row["segment_ids"][used:].any()
    # What predicts the first token of the second example is nothing: the target at the seam is
    # still of the first example.
    seam = len(encoded[1])
    assert row["targets"][seam - 1] == encoded[1].targets[-1]
    assert row["weights"].sum() == sum(e.weights.sum() for e in encoded)
    for segment, key in ((1, "three turns"), (2, "one turn")):
        part = row["segment_ids"] == segment
        cut = Example(row["tokens"][part], row["targets"][part], row["weights"][part])
        assert found(tokenizer, cut) == expected(name, CONVERSATIONS[key])


# ---- tools -----------------------------------------------------------------------------------


def test_tool_calls_train_as_the_model_must_write_them(load):
    tokenizer = load("qwen2_5")
    messages = [user("Weather?"), assistant("", tool_calls=[CALL]), assistant("Cold.")]
    messages.insert(2, {"role": "tool", "content": '{"celsius": -3}'})
    trained = trained_texts(tokenizer, encode(tokenizer, messages))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert trained == [call + END, "Cold." + END]


def test_every_row_of_the_tool_call_file_trains_its_calls_and_answers(load):
    if not TOOL_CALLS.is_file():
        pytest.skip(f"{TOOL_CALLS} is not on this machine")
    tokenizer = load("qwen2_5")
    source = inputs.source(str(TOOL_CALLS))
    raw_rows = [json.loads(line) for line in TOOL_CALLS.read_text(encoding="utf-8").splitlines()]
    assert len(raw_rows) == 300
    for raw in raw_rows:
        item = formats.messages(raw, source)
        trained = trained_texts(tokenizer, encode(tokenizer, item.messages, item.tools))
        turns = [message for message in raw["messages"] if message["role"] == "assistant"]
        assert len(trained) == len(turns)
        for text, turn in zip(trained, turns, strict=True):
            assert text.endswith(END)
            calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
            given = [call["function"] for call in turn.get("tool_calls") or ()]
            assert [json.loads(call) for call in calls] == [
                {"name": call["name"], "arguments": call["arguments"]} for call in given
            ]
            spoken = text.removesuffix(END).split("<tool_call>")[0].strip()
            assert spoken == turn["content"].strip()


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_a_template_that_drops_tool_calls_is_refused(load, name):
    messages = [user("Weather?"), assistant("", tool_calls=[CALL])]
    with pytest.raises(ValueError, match="leaves out part of a message: 'get_weather'"):
        encode(load(name), messages)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_a_template_that_drops_the_tools_is_refused(load, name):
    with pytest.raises(ValueError, match="leaves out the tool 'get_weather'"):
        encode(load(name), CONVERSATIONS["one turn"], [WEATHER])


def test_a_dropped_tool_is_noticed_when_the_text_mentions_it(load):
    messages = [user("Use get_weather, please"), assistant("I will")]
    with pytest.raises(ValueError, match="get_weather"):
        encode(load("tiny"), messages, [WEATHER])


def test_a_template_that_drops_the_arguments_of_calls_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace(
        "message['content']",
        "message['content'] + (message.tool_calls[0].function.name if message.tool_calls else '')",
    )
    messages = [user("Weather?"), assistant("", tool_calls=[CALL])]
    with pytest.raises(ValueError, match="city"):
        encode(templated(template), messages)


# ---- templates that cannot be trained on -------------------------------------------------------


def test_a_template_without_an_end_of_turn_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("'<|im_end|>'", "''")
    with pytest.raises(ValueError, match="would never stop"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_a_template_whose_end_of_turn_is_not_a_special_token_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("'<|im_end|>'", "'</s>'")
    with pytest.raises(ValueError, match="would never stop"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_text_behind_the_end_of_turn_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("'<|im_end|>'", "'<|im_end|> bye'")
    with pytest.raises(ValueError, match="would never stop"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_a_template_that_rewrites_history_trains_each_turn_where_inference_puts_it(templated):
    change = (
        "message['content'] + ('!' if message['role'] == 'assistant' and not loop.last else '')"
    )
    tokenizer = templated(tiny.CHAT_TEMPLATE.replace("message['content'] ", f"{change} "))
    examples = encode_all(tokenizer, CONVERSATIONS["three turns"])
    shifted = Examples.in_memory({"one": examples})
    assert [trained_texts(tokenizer, shifted[i]) for i in range(3)] == [
        ["b" + END],
        ["d e" + END],
        ["g" + END],
    ]
    for example, number in zip(examples, (1, 3, 5), strict=True):
        prompt = tokenizer.apply_chat_template(
            CONVERSATIONS["three turns"][:number], add_generation_prompt=True, tokenize=False
        )
        assert decode(tokenizer, example.ids[: np.argmax(example.weights > 0)]) == prompt


def test_a_template_that_prints_something_else_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("message['content'] ", "(loop.index|string) ")
    with pytest.raises(ValueError, match="leaves out part of"):
        encode(templated(template), CONVERSATIONS["three turns"])


def test_text_that_the_template_adds_to_an_answer_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("message['content'] ", "message['content'] + ' #ad' ")
    with pytest.raises(ValueError, match="adds text of its own to an answer"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_a_generation_prompt_that_turns_do_not_start_with_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("assistant\n'", "assistant\n>'")
    assert template != tiny.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="in another way than its generation prompt"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_a_prompt_that_opens_a_think_block_is_continued_by_the_reasoning(templated):
    # DeepSeek-R1: the template strips all reasoning, and starts every turn with "<think>".
    tokenizer = templated(
        tiny.CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'").replace(
            "message['content'] ", "message['content'].split('</think>')[-1] "
        )
    )
    messages = [user("a"), assistant("<think>\nx y\n</think>\n\nb")]
    example = encode(tokenizer, messages)
    assert found(tokenizer, example) == [
        (False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (True, "x y\n</think>\n\nb" + END),
    ]
    with pytest.raises(ValueError, match="the answer has no reasoning"):
        encode(tokenizer, CONVERSATIONS["one turn"])


def test_qwen3_dropping_earlier_thoughts_gives_an_example_per_turn(load):
    tokenizer = load("qwen3")
    thought = "<think>\nx\n</think>\n\nb"
    messages = [user("a"), assistant(thought), user("c"), assistant("d")]
    examples = Examples.in_memory({"one": encode_all(tokenizer, messages)})
    start = "<|im_start|>"
    assert [found(tokenizer, examples[i]) for i in range(len(examples))] == [
        [
            (False, f"{start}user\na{END}\n{start}assistant\n"),
            (True, thought + END),
            (False, "\n"),
        ],
        [
            (
                False,
                f"{start}user\na{END}\n{start}assistant\nb{END}\n{start}user\nc{END}\n"
                f"{start}assistant\n<think>\n\n</think>\n\n",
            ),
            (True, "d" + END),
            (False, "\n"),
        ],
    ]


@pytest.mark.parametrize("content", ["d", "<think>\n\n</think>\n\nd"])
def test_the_empty_think_block_trains_only_when_asked(load, content):
    tokenizer, messages = load("qwen3"), [user("a"), assistant(content)]
    assert trained_texts(tokenizer, encode(tokenizer, messages)) == ["d" + END]
    asked = encode(tokenizer, messages, train_empty_think=True)
    assert trained_texts(tokenizer, asked) == ["<think>\n\n</think>\n\nd" + END]


def test_a_template_that_cuts_answers_is_refused(templated):
    template = tiny.CHAT_TEMPLATE.replace("message['content'] ", "message['content'][:3] ")
    with pytest.raises(ValueError, match="leaves out part of a message"):
        encode(templated(template), [user("a"), assistant("long")])


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_drops_a_role_is_refused(templated, role):
    template = tiny.CHAT_TEMPLATE.replace(
        "message['content'] ", f"('' if message['role'] == '{role}' else message['content']) "
    )
    messages = [{"role": "system", "content": "SYSTEM"}, user("QUESTION"), assistant("b")]
    with pytest.raises(ValueError, match="leaves out"):
        encode(templated(template), messages)


def test_a_conversation_starting_with_the_assistant_is_refused(load):
    with pytest.raises(ValueError, match="starts with an assistant message"):
        encode(load("tiny"), [assistant("a"), user("b")])


def test_what_the_template_raises_is_a_value_error(templated):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate"):
        encode(templated(template), CONVERSATIONS["one turn"])


def test_a_message_without_content_is_a_value_error(load):
    with pytest.raises(ValueError, match="refuses the conversation.*content"):
        encode(load("tiny"), [user("a"), {"role": "assistant"}])


def test_a_variable_that_the_template_does_not_read_is_refused(load):
    messages = CONVERSATIONS["one turn"]
    for name in ("enable_thinkin", "messages", "add_generation_prompt", "bos_token"):
        with pytest.raises(ValueError, match=f"data.template_args.{name}: .*enable_thinking"):
            encoding.Encoder(load("qwen3"), encoding.Options(template_args={name: False}))
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    encoder = encoding.Encoder(
        load("qwen3"), encoding.Options(template_args={"enable_thinking": False})
    )
    ((example,),) = encoder.encode([formats.Conversation(messages, None)])
    start = int(np.argmax(example.weights > 0))
    assert decode(load("qwen3"), example.ids[:start]).endswith(prompt)


TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content[:2] }}{% endgeneration %}GAP"
    "{% generation %}{{ m.content[2:] }}{% endgeneration %}{% generation %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_of_several_generation_tags_trains_as_a_whole_or_not_at_all(templated):
    messages = [user("a"), assistant("one two"), user("b"), assistant("three")]
    example = encode(templated(TAGGED.replace("GAP", "")), messages)
    assert trained_texts(templated(TAGGED), example) == ["one two" + END, "three" + END]
    gap = "{{ m.content[2:3] }}"  # part of the answer, and in no tag
    template = TAGGED.replace("GAP", gap).replace("[2:] }}{% endg", "[3:] }}{% endg")
    with pytest.raises(ValueError, match="tags leave out part of a turn"):
        encode(templated(template), messages)


# ---- templates and folders that attack ---------------------------------------------------------

ATTACKS = {
    "dunder": "{{ ''.__class__.__mro__ }}",
    "call": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('').x.y }}",
    "mutate": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_cannot_leave_the_sandbox(templated, attack):
    template = ATTACKS[attack] + tiny.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="refuses the conversation"):
        encode(templated(template), CONVERSATIONS["one turn"])


# Each would run for hours or fill the memory, were it not refused.
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "call": "{% macro f() %}{{ caller() }}{% endmacro %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% call f() %}{% endcall %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "product": "{% set ns = namespace(n=3) %}{% for a in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "long text": "{{ 'a' * 10 ** 12 }}",
    "long list": "{{ ([1] * 10 ** 12)|length }}",
    "center": "{{ 'a'.center(10 ** 12) }}",
    "center filter": "{{ 'a'|center(10 ** 12) }}",
    "width named": "{{ 'a'|indent(width=10 ** 12) }}",
    "percent": "{{ '%999999999999d' % 1 }}",
    "format filter": "{{ '%999999999999d'|format(1) }}",
    "star": "{{ '%*d' % (999999999999, 1) }}",
    "batch": "{{ [1]|batch(10 ** 12, 0)|list }}",
    "replace": "{% set a = 'a' * 10 ** 6 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 10 ** 6 %}{{ a|join(a) }}",
    "random text": "{{ lipsum(n=10 ** 12) }}",
    "doubling": "{% set a = 'aaaaaaaaaaaaaaaa' %}" + "{% set a = a + a %}" * 60,
    "doubling by tilde": "{% set a = 'aaaaaaaaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 60,
    "doubling blocks": "{% set a = 'aaaa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "doubling with": "{% set a = 'aaaa' %}" + "{% with a = a ~ a %}" * 60 + "{% endwith %}" * 60,
    "doubling lists": "{% set a = [1] %}" + "{% set a = a + a %}" * 60,
}


@pytest.mark.parametrize("attack", ENDLESS)
def test_a_template_that_would_not_end_or_fill_the_memory_is_refused(
    templated, attack, monkeypatch
):
    monkeypatch.setattr(sandbox, "MOST_TURNS", 100_000)  # seconds, not half a minute
    began, template = time.process_time(), ENDLESS[attack] + tiny.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="chat template"):
        encode(templated(template), CONVERSATIONS["one turn"])
    assert time.process_time() - began < 15


def test_large_numbers_and_long_texts_of_the_data_pass_a_template(templated):
    shown = "{{ 1234567890123|string }} {{ namespace(n=12345678).n|tojson }} {{ 10 ** 15 % 7 }} "
    ours = templated(shown + "{{ '%05d' % 7 }} {{ '-' * 80 }}{{ messages[0].content }}")
    text = ChatTemplate(ours, {}, "2026-01-01").render([user("q" * 10**6)], None)
    assert text == "1234567890123 12345678 6 00007 " + "-" * 80 + "q" * 10**6


@pytest.mark.parametrize("code", ["{{ 1 // 0 }}", "{{ range(10**9)|list }}"])
def test_arithmetic_errors_of_a_template_are_value_errors(templated, code):
    with pytest.raises(ValueError):
        encode(templated(code + tiny.CHAT_TEMPLATE), CONVERSATIONS["one turn"])


def test_loading_a_tokenizer_runs_no_code_from_the_folder(tmp_path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    file = tmp_path / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": [None, "evil.T"]},
        "tokenizer_class": "T",
    }
    file.write_text(json.dumps(changed))
    try:
        encoding.load_tokenizer(tmp_path)
    except ValueError:
        pass  # refusing is as good as ignoring
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        encoding.load_tokenizer(tmp_path)
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template: set data.chat_template to a .jinja"):
        encoding.load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_a_value_error(load):
    with pytest.raises(ValueError):
        encode(load("tiny"), [user("\ud83d"), assistant("a")])


# ---- the end of a turn --------------------------------------------------------------------------

TWO_ENDS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content + ('<|endoftext|>' if 'call' in m.content else '<|im_end|>') + '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
# As Phi-3: one more token behind the last turn, which ends no turn.
FINAL_TOKEN = tiny.CHAT_TEMPLATE + (
    "{% if not add_generation_prompt and messages[-1].role == 'assistant' %}"
    "{{ '<|endoftext|>' }}{% endif %}"
)


def ends_of(tokenizer, items, **options) -> list[str]:
    results = encoding.Encoder(tokenizer, encoding.Options(**options)).encode(items)
    ends: list[int] = []
    for result in results:
        assert not isinstance(result, str), result
        ends += [end for one in result for end in one.turn_ends]
    return tokenizer.convert_ids_to_tokens(ends)


def test_every_trained_turn_gives_the_token_that_ends_it_and_no_other_turn_does(load, templated):
    two = [user("a"), assistant("call"), user("b"), assistant("c")]
    silent = [user("a"), assistant("call", train=False), user("b"), assistant("c")]
    items = [formats.Conversation(two, None), formats.Conversation(silent, None)]
    assert ends_of(load("tiny"), items) == [END] * 3
    assert ends_of(templated(TWO_ENDS), items) == ["<|endoftext|>", END, END]
    assert ends_of(templated(TWO_ENDS), items, turns="last") == [END, END]
    assert ends_of(templated(FINAL_TOKEN), items) == [END] * 3


def test_texts_end_with_eos_and_tokens_with_a_special_token_or_nothing(load):
    tokenizer = load("tiny")
    assert ends_of(tokenizer, [formats.Text("a", "b"), formats.Text("", "c")]) == [END, END]
    start, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", END])
    a, newline = tokenizer.encode("a\n", add_special_tokens=False)

    def tokens(ids, trains):
        return formats.Tokens(ids, [float(one) for one in trains])

    assert ends_of(tokenizer, [tokens([a, end, a, a, start], [0, 1, 0, 1, 1])]) == [
        END,
        "<|endoftext|>",
    ]
    assert ends_of(tokenizer, [tokens([a, a, end, newline, newline], [0, 1, 1, 1, 1])]) == [END]
    assert ends_of(tokenizer, [tokens([end, newline], [0, 1])]) == []  # the end is context
    assert ends_of(tokenizer, [tokens([end, a, newline], [1, 1, 1])]) == []  # cut at a length


# ---- tokenizers that report other offsets ------------------------------------------------------


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["hi", "\nhi", "\n\nhi", "\n\n\n", " hi"])
@pytest.mark.parametrize("prompt_end", ["\n", ": "])
def test_no_trained_token_reaches_into_the_prompt(templated, trim, answer, prompt_end):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ", "Ġh"])}
    merges = [("Ċ", "Ċ"), ("Ġ", "h")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
    backend.add_special_tokens(["<|im_start|>", END])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("\n' +", f"{prompt_end}' +").replace(
        "assistant\n", f"assistant{prompt_end}"
    )
    example = encode(tokenizer, [user("x"), assistant(answer)])
    assert trained_texts(tokenizer, example) == [answer + END]


# ---- any conversation --------------------------------------------------------------------------

TEXT = st.one_of(
    # Without control, private and unassigned characters: SmolLM2's tokenizer has no token for some
    # of their bytes (0x16, 0xF1) and leaves them out.
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"]), max_size=12),
    st.lists(
        st.sampled_from(
            ["\n", " ", "a", "é", "e\u0301", "👍🏽", "<|im_start|>", END, "assistant", "\t"]
        ),
        max_size=8,
    ).map("".join),
)


@st.composite
def conversations(draw) -> list[dict]:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(TEXT)), assistant(draw(TEXT))]
    return messages


@pytest.mark.parametrize("name", SYSTEM)
def test_any_conversation_trains_its_answers_alone(load, name):
    tokenizer = load(name)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(conversations())
    def check(messages):
        assert_answers_train_alone(tokenizer, name, messages)

    check()
