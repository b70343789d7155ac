"""Templates for base models: what `data.chat_template` names, renders, refuses and keeps."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import transformers

from jax_sft import config, tiny
from jax_sft.checkpoint import model_files, resume
from jax_sft.data import check
from jax_sft.data.chat import chat_templates, encoding
from jax_sft.data.sources import formats
from jax_sft.data.tokens import prepare
from jax_sft.weights import vocabulary

SHARED = Path(__file__).resolve().parents[4] / "shared"
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKS = (*MARKS, "<start_of_turn>", "<end_of_turn>", "<s>", "</s>")
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [
    *({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}),
    *({"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}),
]
TOOLS = [{"type": "function", "function": {"name": "get_sky", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "get_sky", "arguments": {"city": "Oslo"}}}


def write_tokenizer(folder: Path, marks=MARKS, eos="</s>") -> Path:
    """Write a byte tokenizer with these special tokens and no chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(marks))
    bos = "<s>" if "<s>" in marks else None
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def every_mark(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("marks"))


def encoded(folder: Path, text: str, messages, tools=None) -> tuple[str, list[str], set[str]]:
    """The text of a conversation, what of it trains, and the ends of its turns."""
    tokenizer = encoding.load_tokenizer(folder, True, text)
    encoder = encoding.Encoder(tokenizer, encoding.Options(chat_template=text))
    (result,) = encoder.encode([formats.Conversation(messages, tools)])
    assert not isinstance(result, str), result
    (one,) = result
    trained, run = [], []
    for token, weight in zip([*one.ids.tolist(), 0], [*one.weights.tolist(), 0.0], strict=True):
        if weight:
            run.append(token)
        elif run:
            trained.append(tokenizer.decode(run))
            run = []
    return tokenizer.decode(one.ids), trained, {*tokenizer.convert_ids_to_tokens(one.turn_ends)}


@pytest.mark.parametrize(
    ("name", "start", "between", "end"),
    [
        ("chatml", "<|im_start|>{}\n", "\n", "<|im_end|>"),
        ("llama3", "<|start_header_id|>{}<|end_header_id|>\n\n", "", "<|eot_id|>"),
        ("gemma", "<start_of_turn>{}\n", "\n", "<end_of_turn>"),
        ("zephyr", "<|{}|>\n", "\n", "</s>"),
    ],
)
def test_a_shipped_template_renders_its_format_and_answers_train(
    every_mark, name, start, between, end
):
    def turn(role: str, content: str) -> str:
        role = "model" if (name, role) == ("gemma", "assistant") else role
        return start.format(role) + content + end + between

    bos = "<s>" if name in ("llama3", "gemma") else ""
    turns = [turn(m["role"], m["content"]) for m in MESSAGES]
    template = chat_templates.SHIPPED[name]
    answers = (["Ho" + end, "No" + end], {end})
    assert encoded(every_mark, template, MESSAGES) == (bos + "".join(turns), *answers)
    if name == "gemma":
        first = turn("user", "Be brief.\n\nHi")
    else:
        first = turn("system", "Be brief.") + turns[0]
    expected = (bos + first + "".join(turns[1:]), *answers)
    assert encoded(every_mark, template, [SYSTEM, *MESSAGES]) == expected


def test_chatml_writes_tools_calls_and_thoughts(every_mark):
    messages = [
        SYSTEM,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "Blue.", "reasoning_content": "so it is"},
    ]
    text, trained, _ = encoded(every_mark, chat_templates.CHATML, messages, TOOLS)
    call = '<tool_call>\n{"name": "get_sky", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert trained == [
        f"Look.\n{call}\n{call}<|im_end|>",
        "<think>\nso it is\n</think>\n\nBlue.<|im_end|>",
    ]
    assert text.startswith(
        "<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>"
    )
    assert "<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n" in text


def test_a_template_whose_end_of_turn_the_tokenizer_lacks_is_refused_with_the_cure(tmp_path):
    folder = write_tokenizer(tmp_path, marks=("<s>", "</s>"))
    with pytest.raises(ValueError, match=r"uses <\|im_end\|>, <\|im_start\|>.*'</s>' \(\"zephyr\""):
        encoding.load_tokenizer(folder, True, chat_templates.CHATML)
    own = chat_templates.CHATML + "{# mine #}"
    tokenizer = encoding.load_tokenizer(folder, True, own)
    with pytest.raises(ValueError, match="would never stop: .*'</s>'"):
        encoding.Encoder(tokenizer, encoding.Options(chat_template=own))
    no_eos = write_tokenizer(tmp_path / "no_eos", marks=("<s>",), eos=None)
    with pytest.raises(ValueError, match="uses eos_token, which"):
        encoding.load_tokenizer(no_eos, True, chat_templates.ZEPHYR)
    with pytest.raises(ValueError, match=r"set data.chat_template to a .jinja file.*'chatml'"):
        encoding.load_tokenizer(folder)


def test_what_is_no_template_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "a.jinja").write_text("{{ 'ü' }}\n", encoding="utf-8")
    (inside / "link.jinja").symlink_to("../a.jinja")
    (inside / "near.jinja").symlink_to(tmp_path / "inside/near.txt")
    (inside / "near.txt").write_text("near")
    (tmp_path / "large.jinja").write_bytes(b"x" * 1_000_001)
    (tmp_path / "latin.jinja").write_bytes(b"\xfc")
    (tmp_path / "empty.jinja").write_text(" \n")
    os.mkfifo(tmp_path / "fifo.jinja")
    assert chat_templates.read("a.jinja") == "{{ 'ü' }}\n" == chat_templates.read("./a.jinja")
    assert chat_templates.read("inside/near.jinja") == "near"
    assert chat_templates.read("") == ""
    for given, reason in (
        ("chatlm", "neither a file nor one of .*'chatml', 'llama3', 'gemma', 'zephyr'"),
        ("inside/link.jinja", "is a link out of its folder"),
        ("inside", "is a folder, not a regular file"),
        ("fifo.jinja", "is a FIFO, not a regular file"),
        ("large.jinja", "has more than 1,000,000 bytes"),
        ("latin.jinja", "is not UTF-8"),
        ("empty.jinja", "is empty"),
        ("https://a/b.jinja", "is a URL"),
    ):
        with pytest.raises(ValueError, match=f"data.chat_template = .*{reason}"):
            chat_templates.read(given)
        data = config.default().data
        data.chat_template = given
        assert any(reason.partition(" .*")[0] in problem for problem in check.problems(data))


def test_the_text_and_not_the_path_of_a_template_decides_the_tokens(tmp_path):
    data = config.default().data
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text(chat_templates.CHATML)
        data.chat_template = str(tmp_path / name)
        assert prepare.options(data).chat_template == chat_templates.CHATML
    stored = config.to_dict(config.default())
    today = stored | {"data": stored["data"] | {"chat_template": "other"}}
    assert config.drift(stored, today) == {}


@pytest.fixture
def kept(tmp_path):
    """A model folder with templates of all kinds, and a checkpoint folder that keeps chatml."""
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    tiny.write_tokenizer(folder)
    (folder / "additional_chat_templates/tool_use.jinja").write_text("old")
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    (folder / "config.json").write_text("{}")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "old"}))
    (tmp_path / "checkpoints").mkdir()
    model = model_files.Model(folder, {}, chat_templates.CHATML)
    model_files.keep(tmp_path / "checkpoints", model)
    return model, tmp_path / "checkpoints"


def test_what_is_kept_has_this_template_and_no_other(kept):
    model, checkpoints = kept
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "model_files")
    assert tokenizer.chat_template == chat_templates.CHATML
    text = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert sorted(file.name for file in (checkpoints / "model_files").iterdir()) == [
        *("chat_template.jinja", "config.json", "manifest.0.json", "tensor_dtypes.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert "chat_template" in json.loads((model.folder / "tokenizer_config.json").read_text())


def test_a_resumed_run_compares_the_text_of_the_template(kept):
    model, checkpoints = kept
    assert model_files.changed(checkpoints, model) == []
    finder = resume.Resume(
        *(checkpoints, None, model, "", vocabulary.Vocabulary(0, {}), print), eval_data={}, bound=()
    )
    for text in ("", chat_templates.ZEPHYR):
        finder._model = model_files.Model(model.folder, {}, text)
        files = model_files.changed(checkpoints, finder._model)
        metadata = {"config": {"data": {"chat_template": "chatml"}}}
        key, line = finder._changed_files(files, metadata)
        assert key == "data.chat_template" and "is not that of the checkpoint" in line
        finder.keep_model_files()
        assert model_files.changed(checkpoints, finder._model) == files  # not as allowed yet
        finder._replaces_files = True
        finder.keep_model_files()
        assert model_files.changed(checkpoints, finder._model) == []
        finder._replaces_files = False
        model_files.keep(checkpoints, model, replace=True)
    (model.folder / "config.json").write_text("{ }")
    assert (
        finder._changed_files(model_files.changed(checkpoints, model), metadata)[0] == "model.path"
    )


def test_qwen_base_is_trained_by_its_own_template_or_a_shipped_one():
    folder = SHARED / "tokenizers/qwen2_5"
    if not folder.is_dir():
        pytest.skip(f"the tokenizer {folder} is not on this machine")
    _, trained, ends = encoded(folder, chat_templates.CHATML, MESSAGES)
    assert (trained, ends) == (["Ho<|im_end|>", "No<|im_end|>"], {"<|im_end|>"})
