"""Ten thousand mutated rows: each becomes an item or a clear error, and the good ones stay good."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_sft import tiny
from jax_sft.data.chat import encoding
from jax_sft.data.sources import formats, read
from jax_sft.data.sources.formats import Conversation, Text, Tokens
from tests import inputs

NUM_ROWS = 10_000
MEGABYTE = "0123456789" * 100_000
CONTROL = "<|im_end|>\n<|im_start|>assistant\nmine<|im_end|>\n"
WORDS = [
    "a",
    "two words",
    " led by a space",
    "é",
    "日本語",
    "🙂",
    '"quoted"',
    "\\",
    "\u2028b",  # an answer of blanks alone is refused
    CONTROL,
]
FIELD = re.compile(
    r"fields? '(messages|tools|conversations|system|prompt|response|completion|text|ids|mask|labels"
    r"|input_ids|attention_mask)'|(messages|conversations|prompt|completion|ids|mask|input_ids|labels)\["
)


# ---- good rows -----------------------------------------------------------------------------------


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def turns(rng: random.Random) -> list[dict[str, Any]]:
    """Messages that `formats` leaves as they are, and that the tiny template can render."""
    found = [{"role": "system", "content": words(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        found.append({"role": "user", "content": words(rng)})
        answer = {"role": "assistant", "content": words(rng)}
        mark = rng.choice([{}, {}, {}, {"train": True}, {"weight": 0.5}])
        found.append(answer | mark)
    return found


def prompt_response(rng: random.Random) -> tuple[dict, formats.Item]:
    row = {"prompt": words(rng), "response": words(rng)}
    asked, answer = row.values()
    item = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return row, Conversation(item, None)


def messages(rng: random.Random) -> tuple[dict, formats.Item]:
    found = turns(rng)
    return {"messages": found, "tools": None}, Conversation(found, None)


def calling(rng: random.Random) -> tuple[dict, formats.Item]:
    call = {"name": "f", "arguments": {words(rng): words(rng), "n": [rng.random(), None]}}
    call = {"type": "function", "function": call}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"n": {"type": "array"}}}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = [*turns(rng), {"role": "user", "content": words(rng)}, asking]
    found += [{"role": "tool", "content": words(rng)}, {"role": "assistant", "content": "so"}]
    return {"messages": found, "tools": [tool]}, Conversation(found, [tool])


def sharegpt(rng: random.Random) -> tuple[dict, formats.Item]:
    found = turns(rng)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    spoken = [{"from": names[t["role"]], "value": t["content"]} for t in found]
    marks = [{k: v for k, v in t.items() if k in ("train", "weight")} for t in found]
    row = {"conversations": [one | mark for one, mark in zip(spoken, marks, strict=True)]}
    return row, Conversation(found, None)


def prompt_completion(rng: random.Random) -> tuple[dict, formats.Item]:
    if rng.random() < 0.5:
        prompt, completion = words(rng), words(rng)
        return {"prompt": prompt, "completion": completion}, Text(prompt, completion)
    history, found = turns(rng), turns(rng)[-2:]
    before = [
        {"train": False} | turn if turn["role"] == "assistant" and "weight" not in turn else turn
        for turn in history
    ]
    return {"prompt": history, "completion": found}, Conversation([*before, *found], None)


def text(rng: random.Random) -> tuple[dict, formats.Item]:
    row = {"text": words(rng)}
    return row, Text("", row["text"])


def tokens(rng: random.Random) -> tuple[dict, formats.Item]:
    ids = [rng.randrange(250) for _ in range(rng.randint(2, 20))]
    mask = [rng.randrange(2) for _ in ids]
    item = Tokens(ids, [float(mark) for mark in mask])
    if rng.random() < 0.5:
        return {"ids": ids, "mask": mask}, item
    labels = [token if mark else -100 for token, mark in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}, item


MAKERS: dict[str, tuple[str, Callable[[random.Random], tuple[dict, formats.Item]]]] = {
    **{"prompt_response": ("prompt_response", prompt_response), "messages": ("messages", messages)},
    **{"calling": ("messages", calling), "sharegpt": ("sharegpt", sharegpt)},
    **{"prompt_completion": ("prompt_completion", prompt_completion)},
    **{"text": ("text", text), "tokens": ("tokens", tokens)},
}

# ---- mutations -----------------------------------------------------------------------------------

VALUES = [
    *(None, True, False, 0, -1, 1, 2, 10**30, 0.5, -0.5, 1e39, float("nan"), float("inf")),
    *("", " ", "x", "\ud800", "a\udfffb", "\0\x01\x1b[31m", CONTROL, "{", '{"a": 1}', "assistant"),
    *([], {}, [[]], [None], ["x"], [{}], {"": None}, {"role": "user"}, {"type": "text"}),
    [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}],
    {"name": "f", "arguments": "{}"},
]
# JSON, or what looks like it, that json.dumps does not write.
RAW = [
    *(b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"01", b"'x'", b"tru", b'"\x01"', b'"\xff\xfe"'),
    *(b'"\xed\xa0\x80"', b'{"a": 1, "a": 2}', b'{"role": "user", "role": "system"}', b'"\\ud83d"'),
    *(b"[" * depth + b"]" * depth for depth in (50, 200, 450, 900, 10_000)),
    *(b'{"a":' * depth + b"0" + b"}" * depth for depth in (50, 200, 450, 900, 10_000)),
]
LINES = [b"[]", b"[1]", b"null", b"3", b'"x"', b"{}", b"x", b"{", b"}", b"\xef\xbb\xbf{}", b"\0"]


def places(value: Any, found: list) -> list[tuple[Any, Any]]:
    """All (container, key) within a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        found.append((value, key))
        if isinstance(inner, dict | list):
            places(inner, found)
    return found


def mutated(row: dict, rng: random.Random) -> bytes:
    """One line that holds a broken form of a row."""
    kind = rng.choice(["value", "value", "value", "raw", "key", "drop", "twice", "bytes", "line"])
    row = json.loads(json.dumps(row))
    container, key = rng.choice(places(row, []))
    raw = b""
    if kind == "value":
        container[key] = rng.choice(VALUES) if rng.random() < 0.998 else MEGABYTE
    elif kind == "raw":
        container[key], raw = "@RAW@", rng.choice(RAW)
    elif kind == "drop":
        del container[key]
    elif kind == "key" and isinstance(container, dict):
        other = rng.choice(["prefix", "audio", "function_call", "name", "\ud800", "attention_mask"])
        container[rng.choice([key, other, "weight", "train"])] = rng.choice(VALUES)
    elif kind == "twice" and isinstance(container, list):
        container.insert(rng.randint(0, len(container)), container[key])
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5 or "\\ud" in json.dumps(row))
    data = line.encode("utf-8", "surrogatepass").replace(b'"@RAW@"', raw)
    if kind == "line":
        return rng.choice(LINES)
    if kind == "bytes":
        start, stop = sorted(rng.choices(range(len(data) + 1), k=2))
        data = rng.choice(
            [
                data[:start],
                data[:start] + data[stop:],
                data[:start] + bytes([rng.choice(b'\0\x01\x80\xff{}[]",:\\')]) + data[start:],
                data[:stop] + data[start:],
                data[:start] + rng.randbytes(4).replace(b"\n", b"") + data[start + 4 :],
            ]
        )
    return data


def fuzzed(name: str, num_rows: int) -> tuple[list[bytes], dict[int, tuple[dict, formats.Item]]]:
    """Lines of a file, and {line number: (row, item)} of those that are not mutated."""
    rng = random.Random(f"{name} 0")
    lines, good = [], {}
    for _ in range(num_rows):
        lines += [rng.choice([b"", b" \t\r"]) for _ in range(rng.random() < 0.05)]
        row, item = MAKERS[name][1](rng)
        if rng.random() < 0.3:
            lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
            good[len(lines)] = (row, item)
        else:
            lines.append(mutated(row, rng))
    return lines, good


def parsed(line: bytes) -> Any:
    """A line as the json module reads it; None if it does not."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    """{maker: (lines, good rows, [(line number, row, item or error)])}, each read only once."""
    done = {}

    def fuzz(name: str):
        if name not in done:
            lines, good = fuzzed(name, NUM_ROWS // len(MAKERS) + 1)
            file = tmp_path_factory.mktemp("fuzz") / f"{name}.jsonl"
            file.write_bytes(b"\n".join(lines))
            source = inputs.source(file, format=MAKERS[name][0])
            done[name] = (lines, good, results(source, file))
        return done[name]

    return fuzz


def results(source, file: Path) -> list[tuple[int, dict | None, Any]]:
    """(line number, row, item or what is wrong) of all rows; anything but a ValueError escapes."""
    to_item, found = formats.FORMATS[source.format], []
    for chunk in read.chunks(source, read.files(source)):
        for record in read.parse(chunk):
            place = re.fullmatch(re.escape(str(file)) + r", line (\d+)", record.where)
            assert place and (record.row is None) == bool(record.error)
            item: Any = record.error
            if record.row is not None:
                try:
                    item = to_item(record.row, source)
                except ValueError as error:
                    item = str(error)
            found.append((int(place[1]), record.row, item))
    return found


# ---- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_every_mutated_row_is_an_item_or_a_named_error(fuzz, name):
    lines, good, found = fuzz(name)
    assert [place for place, _, _ in found] == [
        n for n, line in enumerate(lines, 1) if line.strip()
    ]
    for place, row, item in found:
        if row is None:
            assert len(item) < 300
        elif isinstance(item, str):
            assert FIELD.match(item) and len(item) < 600, item
        else:
            assert isinstance(item, formats.Item)
        if place not in good and row is not None:
            assert repr(row) == repr(parsed(lines[place - 1]))  # repr: NaN is not equal to itself
    counts = [sum(bool(test(row, item)) for _, row, item in found) for test in OUTCOMES.values()]
    assert min(counts) > 50, dict(
        zip(OUTCOMES, counts, strict=True)
    )  # the claim is about something


OUTCOMES: dict[str, Callable[[dict | None, Any], bool]] = {
    "items": lambda row, item: not isinstance(item, str),
    "unreadable": lambda row, item: row is None,
    "refused": lambda row, item: row is not None and isinstance(item, str),
}


@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_are_not_mutated_come_out_unchanged(fuzz, name):
    _, good, found = fuzz(name)
    assert len(good) > 200
    assert {place: (row, item) for place, row, item in found if place in good} == good


def test_the_fuzz_has_ten_thousand_rows_and_covers_all_formats(fuzz):
    assert sum(len(fuzz(name)[2]) for name in MAKERS) >= NUM_ROWS - 200  # some are cut to nothing
    assert {name for name, _ in MAKERS.values()} == set(formats.FORMATS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_list_of_mutated_rows_is_read_or_named_as_a_whole(fuzz, name, tmp_path):
    lines = [line for line in fuzz(name)[0] if line.strip() and len(line) < 100_000]
    file, fatal = tmp_path / "a.json", 0
    for start in range(0, len(lines), 10):
        part = lines[start : start + 10]
        file.write_bytes(b"[" + b",\n".join(part) + b"]")
        source = inputs.source(file)
        try:
            found = [r for chunk in read.chunks(source, [file]) for r in read.parse(chunk)]
        except ValueError as error:
            fatal += 1
            named = re.escape(f"source.path = {source.path!r}: {file}: line ")
            assert re.match(named + r"\d+: ", str(error)), error
            assert None in map(parsed, part)
            continue
        rows = [row for row in map(parsed, part) if isinstance(row, dict)]
        if len(found) == len(part):
            assert len([record for record in found if record.row is not None]) <= len(rows)
    assert 0 < fatal < len(lines) / 10


# ---- through the encoder -------------------------------------------------------------------------


# The tiny one, with tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    tokenizer = encoding.load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return encoding.Encoder(tokenizer, encoding.Options())


@pytest.mark.parametrize("name", MAKERS)
def test_every_item_is_encoded_or_refused(fuzz, encoder, name):
    _, good, found = fuzz(name)
    items = {place: item for place, _, item in found if not isinstance(item, str)}
    encoded = encoder.encode(list(items.values()))
    assert len(encoded) == len(items)
    for place, examples in zip(items, encoded, strict=True):
        if isinstance(examples, str):
            assert place not in good and 10 < len(examples)
            continue
        assert examples
        for one in examples:
            assert one.ids.dtype == np.int32 and one.weights.dtype == np.float32
            assert one.ids.shape == one.weights.shape and len(one.ids)
            assert np.isfinite(one.weights).all() and (one.weights >= 0).all()
    # A bad neighbour changes nothing.
    alone = encoder.encode([items[place] for place in good])
    together = dict(zip(items, encoded, strict=True))
    for place, examples in zip(good, alone, strict=True):
        for one, other in zip(examples, together[place], strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.weights.tolist() == other.weights.tolist()
