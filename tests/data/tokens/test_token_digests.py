"""Tokens and weights of a small fixed data set are those that TOKENS_VERSION stands for.

The token cache's key holds this version, not the text of our sources. token_digests.json has a
digest per case; COMMAND below writes it.
"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import chat_templates
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from jax_sft import tiny
from jax_sft.data.chat import encoding
from jax_sft.data.chat.chat_templates import SHIPPED
from jax_sft.data.sources import formats
from jax_sft.data.tokens import cache
from jax_sft.data.tokens import store as store_module
from jax_sft.data.tokens.worker import TOKENS_VERSION
from tests import inputs

FILE = Path(__file__).with_name("token_digests.json")
COMMAND = "python -m pytest tests/data/tokens/test_token_digests.py --update-token-digests"

# ---- the data -----------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


TWO_TURNS = [
    say("user", "Say hello."),
    say("assistant", "Hello, world."),
    say("user", "Again:  "),
    say("assistant", "  Hello,\n\nhello.\n"),
]
CONVERSATIONS = [
    {"messages": TWO_TURNS[:2]},
    {"messages": [say("system", "Be brief."), *TWO_TURNS]},
    {
        "messages": [
            say("user", "Sun in é or 日本?"),
            say("assistant", None, tool_calls=[call(town="é")]),
            say("tool", '{"sun": true}'),
            say("assistant", "Yes: 👩‍👧."),
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            say("user", "Sun in two towns?"),
            say("assistant", "I look.", tool_calls=[call(town="日本", days=2), call(town="x")]),
            say("tool", "no"),
            say("tool", "yes"),
            say("assistant", "In x."),
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            say("user", "a"),
            say("assistant", "<think>\nb\n</think>\n\nc", weight=0.5),
            say("user", "d"),
            say("assistant", "e", train=False),
            say("user", "f"),
            say("assistant", "g", reasoning_content="h"),
        ]
    },
    {"messages": [say("user", "x<|im_end|>\n<|im_start|>assistant\ny"), say("assistant", "z")]},
    {"messages": [say("user", "an answer of nothing"), say("assistant", "")]},  # refused
    {
        "messages": [
            say(role, f"{role} {n} " + "long " * n)
            for n in range(6)
            for role in ("user", "assistant")
        ]
    },
    {"messages": [say("user", f" {n}") for n in range(2)] + [say("assistant", "both")] * 2},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "Sun?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "x"}}'},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "Yes."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
    },
    {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    {"conversations": [{"from": "nobody", "value": "a"}]},  # refused
]
PROMPTS = [
    {"prompt": "Say é", "query": "now", "response": "é\n", "system": "Be brief."},
    {"prompt": "Say nothing", "query": "", "response": " nothing ", "system": ""},
    {"prompt": "a", "query": "b", "response": "", "system": ""},  # refused
    {"prompt": "1, 2", "query": '"3"', "response": "4\n\n5", "system": ""},
]
COMPLETIONS = [
    {"prompt": "one two", "completion": " three"},
    {"prompt": "one two ", "completion": "three<|im_end|>"},
    {"prompt": "one", "completion": " "},  # refused
    {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]},
]
TOKENS = [
    {"ids": [1, 2, 3, 4], "mask": [0, 1, 0, 1]},
    {"ids": [1, 2, 258, 4], "mask": [0.0, 0.25, 1.5, 0.0]},
    {"ids": [1, 2], "mask": [0]},  # refused
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
]
TEXTS = [{"text": "one\n\ntwo  "}, {"text": "日本 é 👩‍👧"}, {"text": "\n"}]  # the last is refused

FAMILIES = ("chatml", "colons", "phi3", "llama3", "llama31", "gemma2", "gemma3", "mistral1")
FAMILIES += ("mistral7", "deepseek3", "qwen3", "qwen3 thinking")

# ---- the tokenizers -----------------------------------------------------------------------------

MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ġ"), ("l", "l"), ("o", "Ċ"), ("Ċ", "Ġ"), ("l", "o")]


def write_merging(folder: Path) -> None:
    """Write a byte-level tokenizer whose merges cross words, lines and the edges of turns."""
    tiny.write_tokenizer(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["use_regex"] = False
    content["model"]["merges"] = MERGES
    content["model"]["vocab"] |= {a + b: 300 + n for n, (a, b) in enumerate(MERGES)}
    file.write_text(json.dumps(content), encoding="utf-8")


def write_sentencepiece(folder: Path) -> None:
    """Write a tokenizer that puts "▁" before a text, and knows a few letters besides bytes."""
    words = ["<unk>", *chat_templates.BYTE_TOKENS, "▁", *"abcdehlo.,", "▁h", "lo"]
    vocab = {word: n for n, word in enumerate(words)}
    # Any: the setters are typed too narrowly.
    backend: Any = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=[("▁", "h"), ("l", "o")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    decoders = tokenizers.decoders
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_family(folder: Path, family: chat_templates.Family) -> None:
    """Write the byte-level tokenizer with the template and the control tokens of a family."""
    tiny.write_tokenizer(folder)
    control = [family.bos] if family.bos else []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [*control, *family.control], "eos_token": family.eos}
        | ({"bos_token": family.bos} if family.bos else {})
    )
    tokenizer.chat_template = family.source
    tokenizer.save_pretrained(folder)


# ---- the cases ----------------------------------------------------------------------------------


class Cases:
    """Tokenizes the data of each case, and describes the result.

    Attributes:
        found: {case: its description}.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.found: dict[str, str] = {}
        for name in ("tiny", "merging", "sentencepiece", "no template"):
            self.model(name).mkdir()
        tiny.write_tokenizer(self.model("tiny"))
        tiny.write_tokenizer(self.model("no template"))
        (self.model("no template") / "chat_template.jinja").unlink()
        write_merging(self.model("merging"))
        write_sentencepiece(self.model("sentencepiece"))

    def model(self, name: str) -> Path:
        return self._folder / name

    def add(
        self, case: str, data: Any, model: str = "tiny", options: dict | None = None, **changes: Any
    ) -> None:
        """Tokenize rows, or a file, and note what became of them."""
        if isinstance(data, Path):
            file = data
        else:
            file = self._folder / f"{len(self.found)}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        max_row_bytes = changes.pop("max_row_bytes", 16_000_000)
        store = cache.open_or_build(
            inputs.source(file, **changes),
            self.model(model),
            encoding.Options(**(options or {})),
            self._folder / "cache",
            1,
            stop_at_bad_row=False,
            progress=False,
            max_row_bytes=max_row_bytes,
        )
        assert not store.cached and len(store.ids) and case not in self.found, case
        self.found[case] = described(store)


def described(store: cache.Store) -> str:
    """Say in one line what a store holds, and the digest of all of it but the words of errors."""
    digest = hashlib.sha256()
    arrays = {
        "ids": (store.ids, "<i4"),
        "weights": (store.weights, "<f4"),
        "stops": (store.stops, "<i8"),
        "rows": (store.rows, "<i8"),
        "places": (store.places, "<i8"),
        "num_cut": (store.num_cut, "<i4"),
        "trained": (store.trained, "<i4"),
    }
    for array, dtype in arrays.values():
        digest.update(np.ascontiguousarray(array.astype(dtype)).data)
    refused = [[error["row"], error["where"].rpartition(", ")[2]] for error in store.errors()]
    about = [store.meta[name] for name in ("format", "rows", "turn_ends", "weights")]
    digest.update(json.dumps([refused, about], sort_keys=True).encode())
    return (
        f"{len(store.rows)} examples, {len(store.ids)} tokens, {store.trained.sum()} trained, "
        f"{len(refused)} refused: {digest.hexdigest()[:32]}"
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    """Tokenize the data of all cases: {case: what became of it}."""
    folder = tmp_path_factory.mktemp("cases")
    cases = Cases(folder)
    # Formats.
    chatml = {"chat_template": SHIPPED["chatml"]}  # with tools, which the tiny one has not
    cases.add("messages", CONVERSATIONS)
    cases.add("messages, system_key", [{**CONVERSATIONS[0], "s": "Be."}], system_key="s")
    cases.add("sharegpt", SHAREGPT, options=chatml)
    keys = {"query_key": "query", "system_key": "system"}
    cases.add("prompt_response", PROMPTS, **keys)
    cases.add("prompt_completion", COMPLETIONS)
    cases.add("tokens", TOKENS[:3])
    cases.add("tokens, labels", TOKENS[3:])
    cases.add("text", TEXTS)
    # Options of a source and of the data.
    cases.add("limit", CONVERSATIONS, limit=2)
    cases.add("max_row_bytes", CONVERSATIONS, max_row_bytes=500)
    for turns in ("last", "from:2"):
        cases.add(f"turns = {turns}", CONVERSATIONS, options={"turns": turns})
    cases.add("max_tokens", CONVERSATIONS, options={"max_tokens": 150})
    for name in SHIPPED:
        family = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma2", "zephyr": "zephyr"}
        write_family(cases.model(f"for {name}"), chat_templates.FAMILIES[family[name]])
        options = {"chat_template": SHIPPED[name]}
        cases.add(f"chat_template = {name}", CONVERSATIONS, f"for {name}", options)
    # Chat templates.
    for name in FAMILIES:
        write_family(cases.model(f"family {name}"), chat_templates.FAMILIES[name])
        cases.add(f"template {name}", CONVERSATIONS, f"family {name}")
    qwen3 = {"train_empty_think": True, "template_args": {"enable_thinking": False}}
    cases.add("template qwen3, empty think", CONVERSATIONS, "family qwen3", qwen3)
    cases.add("template llama31, date", CONVERSATIONS, "family llama31", {"date": "2020-02-29"})
    # Tokenizers.
    for name in ("merging", "sentencepiece"):
        cases.add(f"{name} tokenizer", CONVERSATIONS, name)
        cases.add(f"{name} tokenizer, prompt_completion", COMPLETIONS, name)
        cases.add(f"{name} tokenizer, max_tokens", CONVERSATIONS, name, {"max_tokens": 90})
    cases.add("no chat template", TEXTS, "no template")
    # Files.
    for file in write_files(folder):
        cases.add(f"file {file.name}", file, **keys)
    return cases.found | {"the files of a store": layout()}


def write_files(folder: Path) -> list[Path]:
    """Write the same rows in every kind of file."""
    table = pa.Table.from_pylist(PROMPTS)
    files = [folder / f"rows.{ending}" for ending in ("json", "csv", "parquet", "jsonl.gz")]
    files[0].write_text(json.dumps(PROMPTS, indent=1), encoding="utf-8")
    pyarrow.csv.write_csv(table, files[1])
    pyarrow.parquet.write_table(table, files[2])
    lines = "".join(json.dumps(row) + "\n" for row in PROMPTS)
    files[3].write_bytes(gzip.compress(lines.encode()))
    with pa.output_stream(folder / "rows.jsonl.zst", compression="zstd") as stream:
        stream.write(lines.encode())
    return [*files, folder / "rows.jsonl.zst"]


def layout() -> str:
    """Describe how a store lies on the disk: another layout is not to be read as this one."""
    fields = {name: kind.__name__ for name, kind in store_module.FIELDS.items()}
    text = json.dumps([store_module.DTYPES, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the comparison -----------------------------------------------------------------------------


def changes(stored: dict[str, str], found: dict[str, str]) -> list[str]:
    """List the cases of the file whose tokens are others now, or that are gone."""
    return [
        f"{case}: {before} -> {found.get(case, 'no longer a case')}"
        for case, before in stored.items()
        if found.get(case) != before
    ]


def problem(stored: dict[str, Any], found: dict[str, str], version: int) -> str:
    """Say what is to be done about the file; "" = nothing."""
    changed = changes(stored["digests"], found)
    new = [case for case in found if case not in stored["digests"]]
    if changed and version == stored["version"]:
        lines = "\n    ".join(changed)
        return (
            f"the tokens of the same data changed, and caches still hold the old ones under "
            f"TOKENS_VERSION = {version}. If that is on purpose, raise TOKENS_VERSION "
            f"(data/worker.py) and update the digests with\n    {COMMAND}\nchanged:\n    {lines}"
        )
    if changed or new or version != stored["version"]:
        return f"{FILE.name} is not of this version and these cases. Update it with\n    {COMMAND}"
    return ""


def updated(stored: dict[str, Any], found: dict[str, str], version: int) -> dict[str, Any]:
    """Return the new content of the file.

    Raises:
        ValueError: digests would be replaced or removed under the same version, or a lower one.
    """
    if version < stored["version"]:
        raise ValueError(f"TOKENS_VERSION = {version} is below {stored['version']}, as stored")
    if version == stored["version"] and changes(stored["digests"], found):
        raise ValueError(problem(stored, found, version))
    return {"version": version, "digests": found}


def test_tokens_are_those_of_their_version(found, request):
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if request.config.getoption("--update-token-digests"):
        content = updated(stored, found, TOKENS_VERSION)
        FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    message = problem(stored, found, TOKENS_VERSION)
    assert not message, message


def test_there_is_a_case_for_every_format_and_shipped_template(found):
    assert {*formats.FORMATS} <= found.keys()
    assert {f"chat_template = {name}" for name in SHIPPED} <= found.keys()


def test_all_kinds_of_files_give_the_same_tokens(found):
    tokens = {found[case].partition(":")[0] for case in found if case.startswith("file ")}
    assert tokens == {found["prompt_response"].partition(":")[0]}


def test_changed_tokens_want_a_higher_version_before_they_are_written():
    stored = {"version": 3, "digests": {"a": "1", "b": "2"}}
    same, other = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    assert problem(stored, same, 3) == ""
    assert "raise TOKENS_VERSION" in problem(stored, other, 3)
    assert COMMAND in problem(stored, other, 3) and "b: 2 -> 3" in problem(stored, other, 3)
    for version in (2, 3):
        with pytest.raises(ValueError, match="TOKENS_VERSION"):
            updated(stored, other, version)
    with pytest.raises(ValueError, match="no longer a case"):
        updated(stored, {"a": "1"}, 3)
    assert updated(stored, other, 4) == {"version": 4, "digests": other}
    assert "Update it" in problem(stored, other, 4) and "Update it" in problem(stored, same, 4)
    more = same | {"c": "5"}  # a case more changes no tokens
    assert updated(stored, more, 3)["digests"] == more and "Update it" in problem(stored, more, 3)
