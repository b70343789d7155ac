"""What a model folder may hold: regular files within bounds, tensors that its config.json needs."""

import json
import os
import socket
import struct

import pytest

import jax_sft
from jax_sft import models
from jax_sft.files import strict_json
from jax_sft.validate import validate
from jax_sft.weights import hf_folder, hf_reader

DEEP = 100_000
LIES = {
    "deep": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "deep objects": '{"a": ' * DEEP + "1" + "}" * DEEP,
    "rather deep": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "infinity": '{"rms_norm_eps": Infinity}',
    "nan in a list": '{"long_factor": [1.0, NaN]}',
    "overflow": '{"rms_norm_eps": 1e999}',
    "two values": '{"hidden_size": 48, "hidden_size": 64}',
    "many digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"a": "\xff"}',
    "half": '{"a": ',
    "a list": "[]",
    "too large": '{"a": "' + "x" * strict_json.MAX_BYTES + '"}',
}


@pytest.mark.parametrize("lie", LIES)
def test_json_that_lies_is_one_line_that_names_the_file(tmp_path, lie):
    file, content = tmp_path / "config.json", LIES[lie]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        hf_folder.read_json(file)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_key_that_is_there_twice_with_one_value_is_no_lie(tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32", "dtype": "float32"}')
    assert hf_folder.read_json(tmp_path / "config.json") == {"dtype": "float32"}


def make_special(file, kind: str) -> None:
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(file))


@pytest.mark.parametrize("kind", ["folder", "FIFO", "socket"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_what_is_not_a_regular_file_is_named_and_not_waited_for(
    make_model, name, kind, monkeypatch
):
    folder = make_model()
    (folder / name).unlink(missing_ok=True)
    monkeypatch.chdir(folder)  # paths of sockets are short
    make_special(folder.relative_to(folder) / name, kind)
    with pytest.raises(ValueError, match=f"{name} is a {kind}, not a regular file"):
        hf_folder.resolve(str(folder))
    if name.endswith(".json"):
        with pytest.raises(ValueError, match=f"{name} is a {kind}"):
            hf_folder.read_json(folder / name)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_deep_json_that_transformers_would_read_is_refused_by_its_file(make_model, name):
    folder = make_model()
    (folder / name).write_text(LIES["deep"])
    with pytest.raises(ValueError, match=f"{name} is nested"):
        hf_folder.resolve(str(folder))
    (folder / name).write_text('{"model_max_length": Infinity}')  # Python's json writes that
    assert hf_folder.resolve(str(folder)) == folder


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(100),
        header(b"{}", length=2**63),
        header(b"{}", length=1000),
        header(b'{"\xff": 1}'),
        header(b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
        header({"a": TENSOR | {"data_offsets": [0, 160]}}, bytes(16)),
        header({"a": TENSOR, "b": TENSOR}, bytes(16)),
        header({"a": TENSOR | {"shape": [2**63, 2**63]}}, bytes(16)),
        header({"a": TENSOR}, bytes(32)),
    ],
)
def test_a_safetensors_header_that_lies_is_refused_by_its_file(make_model, content):
    folder = make_model()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        jax_sft.load(folder)


def test_sizes_are_compared_with_the_headers_before_anything_is_made_of_them(make_model):
    folder = make_model()
    raw = json.loads((folder / "config.json").read_text())
    cfg = models.read(raw | {"num_hidden_layers": 4096})[1]
    family = models.find("qwen2")
    with pytest.raises(
        ValueError, match=r"'layers': 4096.* need 49,\d+ tensors, its files have 38"
    ):
        hf_reader.check(folder, family.weights(cfg), cfg.axis_sizes, cfg.tied)
    # Fewer are named one by one.
    cfg = models.read(raw | {"num_hidden_layers": 4})[1]
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp.* is missing"):
        hf_reader.check(folder, family.weights(cfg), cfg.axis_sizes, cfg.tied)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**50},
        {"is_causal": False},
        {"model_type": None},
    ],
    ids=str,
)
def test_train_and_plan_refuse_a_config_json_before_they_make_a_model(
    make_config, make_model, changes
):
    folder = make_model()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({} if "model_type" in changes else raw | changes)
    )
    for planned_for in (None, (9, 0)):
        with pytest.raises(ValueError, match=next(iter(changes))):
            validate(make_config(folder), 1, planned_for=planned_for)
