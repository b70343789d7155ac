"""Hosts with different models under one path are told apart before weights are read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft.checkpoint import model_files, same_weights
from jax_sft.hosts import cluster


@pytest.fixture
def compare(monkeypatch):
    """Run the check as two processes would, each with its own folder."""

    def compare(first, second, **options):
        texts = []
        monkeypatch.setattr(cluster, "num_processes", lambda: 2)
        monkeypatch.setattr(
            cluster, "exchange", lambda what, text, timeout_s: texts.append(text) or [text, text]
        )
        same_weights.check(first, **options)
        of_first = iter(texts)
        monkeypatch.setattr(
            cluster, "exchange", lambda what, text, timeout_s: [next(of_first), text]
        )
        same_weights.check(second, **options)

    return compare


def change(folder, name: str, element: int = 0) -> None:
    """Flip the lowest bit of one element of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1).view(np.uint32)[element] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_host_with_other_files_is_named_with_the_file(make_model, tmp_path, compare):
    here, there = make_model("here"), tmp_path / "there"
    shutil.copytree(here, there)
    compare(here, there)
    change(there, "model.layers.1.mlp.up_proj.weight", 1234)
    with pytest.raises(ValueError, match=r"model\.safetensors of process 1 .*copy them again"):
        compare(here, there)
    shutil.copy(here / "model.safetensors", there)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    with pytest.raises(ValueError, match=r"config\.json of process 1 "):
        compare(here, there)
    shutil.copy(here / "config.json", there)
    (there / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"differ in files of the model: files of process 1 "):
        compare(here, there)


def test_of_a_large_model_each_tensor_is_looked_at_within_the_budget(
    make_model, tmp_path, compare, monkeypatch
):
    monkeypatch.setattr(same_weights, "BUDGET", 2000)
    monkeypatch.setattr(same_weights, "PIECE", 64)
    here, there = make_model("here"), tmp_path / "there"
    size = (here / "model.safetensors").stat().st_size
    share = same_weights.BUDGET / size
    tensors = load_file(here / "model.safetensors")
    for tensor in tensors.values():
        pieces = same_weights._pieces(tensor.nbytes, share)
        assert pieces[0][0] == 0 and sum(pieces[-1]) == tensor.nbytes
        assert sum(size for _, size in pieces) <= max(128, tensor.nbytes * share)
    shutil.copytree(here, there)
    for name in ("model.norm.weight", "model.layers.2.self_attn.o_proj.weight"):
        change(there, name, tensors[name].size - 1)
        with pytest.raises(ValueError, match=r"model\.safetensors of process 1 "):
            compare(here, there)
        shutil.copy(here / "model.safetensors", there)
    compare(here, there)


def test_the_step_that_is_read_is_compared_and_not_the_newest(make_model, tmp_path, compare):
    model, here, there = make_model("model"), tmp_path / "here", tmp_path / "there"
    kept = here / model_files.NAME
    shutil.copytree(model, kept)
    (kept / "model.safetensors").unlink()
    (kept / model_files.DTYPES_FILE).write_text("{}")
    for step in ("1", "2"):
        (here / step).mkdir()
        (here / step / "manifest.json").write_text("{}")
    shutil.copytree(here, there)
    (there / "1" / "manifest.json").write_text('{"a": 1}')
    compare(kept, there / model_files.NAME)
    with pytest.raises(ValueError, match=r"1/manifest\.json of process 1 "):
        compare(kept, there / model_files.NAME, step=1)


def test_a_process_that_is_alone_reads_nothing(tmp_path):
    same_weights.check(tmp_path / "is not there")
