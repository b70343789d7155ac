"""An export ends its answers where the trained turns end: files, lines, generated answers."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import jax_sft
from jax_sft import export_check, tiny
from jax_sft.adapters import peft
from jax_sft.checkpoint import from_hf, stop_tokens, to_hf
from jax_sft.files import step_folders
from tests import inputs

OLD, NEW, RARE = 256, 258, 257  # <|endoftext|>, <|im_end|>, <|im_start|>
ABSENT = object()


def write(folder: Path, generation, config) -> dict[str, bytes]:
    """Write a model folder's eos_token_id; return the bytes of the files."""
    for name, eos in (("generation_config.json", generation), ("config.json", config)):
        if eos is not ABSENT:
            text = json.dumps({"bos_token_id": 1, "eos_token_id": eos, "eps": 1e-06})
            (folder / name).write_text(text)
    return {file.name: file.read_bytes() for file in folder.glob("*.json")}


def eos_of(folder: Path) -> list:
    return [
        json.loads((folder / name).read_text()).get("eos_token_id", ABSENT)
        for name in ("generation_config.json", "config.json")
    ]


@pytest.mark.parametrize(
    ("generation", "config", "written"),
    [
        (OLD, OLD, [[OLD, NEW]] * 2),
        ([OLD, 9], OLD, [[OLD, 9, NEW], [OLD, NEW]]),
        (ABSENT, OLD, [[OLD, NEW]] * 2),
        (ABSENT, None, [NEW] * 2),
        (None, None, [NEW] * 2),
        (None, OLD, [[OLD, NEW]] * 2),
        (None, [OLD, NEW], [[OLD, NEW]] * 2),  # generate reads generation_config.json alone
        (OLD, None, [[OLD, NEW]] * 2),
        ("2", True, [NEW] * 2),
        ([10**9, OLD], OLD, [[OLD, NEW]] * 2),
    ],
)
def test_the_files_name_the_trained_end_behind_what_they_named(
    tmp_path, generation, config, written
):
    write(tmp_path, generation, config)
    stop_tokens.write(tmp_path, stop_tokens.changes(tmp_path, {NEW: 7}, vocab=300))
    assert eos_of(tmp_path) == written
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / name).read_text())["bos_token_id"] == 1
    assert stop_tokens.changes(tmp_path, {NEW: 7}, vocab=300) == {}


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([OLD, NEW], NEW, {NEW: 1}),
        (NEW, [NEW], {NEW: 1}),
        (ABSENT, NEW, {NEW: 1}),
        (OLD, OLD, {}),
        (OLD, OLD, {300: 1}),  # no token of the model
    ],
)
def test_what_names_the_trained_ends_already_is_not_written(tmp_path, generation, config, ends):
    before = write(tmp_path, generation, config)
    stop_tokens.write(tmp_path, stop_tokens.changes(tmp_path, ends, vocab=300))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")} == before


def test_the_start_says_what_ends_texts_and_turns_and_where_the_export_stops(tmp_path):
    tiny.write_tokenizer(tmp_path)
    report = {
        "a": {"format": "messages", "turn_ends": {str(NEW): 3}},
        "b": {"format": "messages", "turn_ends": {str(NEW): 1, str(RARE): 1}},
    }
    ends = stop_tokens.trained(report)
    assert ends == {NEW: 4, RARE: 1}
    assert stop_tokens.line(tmp_path, [OLD], {NEW: 4}, report) == (
        "the model ends texts with '<|endoftext|>' (256), the template ends turns with "
        "'<|im_end|>' (258, 4 turns); the export will stop at both"
    )
    assert "'<|im_start|>' (257, 1 turn); the export will stop at all of them" in stop_tokens.line(
        tmp_path, [OLD], ends, report
    )
    assert stop_tokens.line(tmp_path, [OLD, NEW], {NEW: 4}, report).endswith("as the model does")
    assert "learns no end of text" in stop_tokens.line(tmp_path, [OLD], {}, report)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint folder of a base model: eos is <|endoftext|>, the template ends otherwise."""
    folder = tmp_path_factory.mktemp("base") / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tiny.write_model(folder, tiny.CONFIG | sizes | {"eos_token_id": OLD})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": OLD}) + "\n")
    return from_hf.convert(folder, folder.parent / "checkpoints", progress=False)


@pytest.fixture
def trained(base, monkeypatch):
    """Let the step say which tokens end trained turns."""

    def trained(ends):
        found = step_folders.metadata
        monkeypatch.setattr(
            step_folders,
            "metadata",
            lambda folder: found(folder) | ({"turn_ends": ends} if ends else {}),
        )
        return base

    return trained


def export(capsys, monkeypatch, checkpoint, out, *options) -> tuple[int, str]:
    arguments = ["export_hf", f"--checkpoint={checkpoint}", f"--out={out}", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    code = jax_sft.export.main()
    return code, capsys.readouterr().out


@inputs.needs_torch
def test_an_export_stops_where_turns_end_and_verify_fails_where_it_does_not(
    trained, tmp_path, monkeypatch, capsys
):
    checkpoint, out = trained({str(NEW): 5}), tmp_path / "out"
    code, said = export(capsys, monkeypatch, checkpoint, out, "--verify", "--tokenizer-eos")
    assert code == 0 and "'<|im_end|>' (258, 5 turns): eos_token_id of generation_" in said
    assert "WARNING the stop tokens are right" in said  # weights of no training
    assert eos_of(out) == [[OLD, NEW]] * 2
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    monkeypatch.setattr(stop_tokens, "changes", lambda *_: {})
    code, said = export(capsys, monkeypatch, checkpoint, tmp_path / "bad", "--verify")
    assert (
        code == 65 and "answers DO NOT END: generation continues after '<|im_end|>' (258)" in said
    )


def test_a_checkpoint_that_does_not_say_how_turns_end_is_exported_as_it_was(
    base, tmp_path, monkeypatch, capsys
):
    code, said = export(capsys, monkeypatch, base, tmp_path / "out")
    assert code == 0 and "unknown, generation_config.json is not written" in said
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        before = (base / "model_files" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == before
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ValueError, match="leave out --tokenizer-eos"):
        to_hf.export(base, tmp_path / "other", tokenizer_eos=True, progress=False)
    assert not (tmp_path / "other").exists()


class AdapterPlan(to_hf.Plan):
    """A plan of adapters, whose model's files lie in `folder` itself."""

    is_adapter = True

    @property
    def kept(self) -> Path:
        return self.folder


def test_a_folder_of_adapters_gets_the_stops_that_the_model_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(peft, "write_config", lambda *_: None)
    for name, ends, kept in (("a", {NEW: 1}, True), ("b", {OLD: 1}, False)):
        (folder := tmp_path / name).mkdir()
        write(folder, OLD, OLD)
        plan = to_hf.Plan(**dict.fromkeys(f.name for f in dataclasses.fields(to_hf.Plan)))
        planned = AdapterPlan(
            **vars(plan)
            | {
                "folder": folder,
                "settings": 1,
                "model_def": SimpleNamespace(axis_sizes={"vocab": 300}),
                "metadata": {
                    "turn_ends": {str(end): 1 for end in ends},
                    "config": {"model": {"path": "", "revision": ""}},
                },
            }
        )
        assert ("vLLM: --generation-config" in planned.stop_line) == kept
        stop_tokens.write(folder, planned.stops)
        to_hf._describe_adapter(planned, folder)
        assert (folder / "generation_config.json").exists() == kept
        assert not (folder / "config.json").exists()


@pytest.mark.parametrize("entry", ["x", None, {}, {"content": 3}, [1], {"id": [], "content": None}])
def test_a_damaged_table_of_added_tokens_costs_their_names_only(tmp_path, entry):
    for name, content in (
        ("tokenizer_config.json", {"added_tokens_decoder": {"258": entry, "x": {"content": "a"}}}),
        ("tokenizer.json", {"added_tokens": [entry]}),
        ("tokenizer.json", {"added_tokens": entry}),
    ):
        (folder := tmp_path / f"{len(list(tmp_path.iterdir()))}").mkdir()
        (folder / name).write_text(json.dumps(content))
        assert stop_tokens.names(folder) == {}


def test_an_answer_fails_only_behind_a_trained_end():
    ended = export_check.Answer("hi<|im_end|>", (1, NEW), (OLD, NEW))
    assert ended.line == "a sample answer ends after 2 tokens: 'hi<|im_end|>'"
    assert "WARNING the stop tokens are right" in export_check.Answer("hi", (1,), (NEW,)).line
    assert "no stop token" in export_check.Answer("hi", (1,)).line
