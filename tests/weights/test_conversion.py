"""Weights survive Hugging Face -> shards -> Hugging Face to the last bit, and bad folders are
refused with everything that is wrong with them.
"""

import json
import math
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jax_sft
from jax_sft import models, tiny
from jax_sft.files import manifest
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.weights import hf_folder, hf_reader, hf_writer, placement

LLAMA = {
    **{"model_type": "llama", "tie_word_embeddings": False},
    **{"attention_bias": True, "mlp_bias": True},
}
FAMILIES = {
    "qwen2": {},
    "llama": LLAMA,
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "attention_bias": True},
    "olmo2": {"model_type": "olmo2", "head_dim": 20, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "head_dim": 20, "sliding_window": 7},
    "gemma2": {"model_type": "gemma2", "head_dim": 20, "pad_token_id": None},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 20, "pad_token_id": None},
    "phi3": {"model_type": "phi3", "head_dim": 20, "pad_token_id": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "tie_word_embeddings": False},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2},
}
MESHES = {
    "one_device": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "all_axes": {"fsdp": 2, "tensor": 2, "sequence": 2},
}
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
UNLIMITED = 10**12


def read(folder: Path):
    """Return (weight rows, sizes, {HF name: Tensor}) of a model folder."""
    config = hf_folder.read_json(folder / "config.json")
    family = models.find(config["model_type"])
    cfg = family.Config.from_hf(config)
    rows = family.weights(cfg)
    return rows, cfg.axis_sizes, hf_reader.check(folder, rows, cfg.axis_sizes, cfg.tied)


def there_and_back(folder: Path, out: Path, mesh: str, shard_bytes: int = UNLIMITED) -> list[str]:
    """Load onto the mesh as float32, and write every tensor in its own dtype."""
    rows, dims, tensors = read(folder)
    sizes = MESHES[mesh]
    devices = jax.devices()[: math.prod(sizes.values())]
    shardings = placement.shardings(rows, make_mesh(sizes, devices))
    params = hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False)
    for row in rows:
        assert params[row.path].shape == row.shape(dims)
        assert params[row.path].dtype == np.float32
        assert params[row.path].sharding == shardings[row.path]
    out.mkdir()
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    hashes = hf_writer.save(params, rows, dims, dtypes, out, shard_bytes, progress=False)
    assert hashes == manifest.sha256_of(out, [path.name for path in out.iterdir()])
    hf_folder.copy_side_files(folder, out)
    return [*hashes]


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_same_bits(folder: Path, out: Path) -> None:
    before, after = all_tensors(folder), all_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name


def rewrite(folder: Path, change, file: str = "model.safetensors") -> None:
    """Replace the tensors of a file by `change(tensors)`, which may also edit them in place."""
    tensors = load_file(folder / file)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def split(folder: Path, num_files: int, reverse: bool = False) -> None:
    """Deal the tensors of a folder out to several files with an index, by hand."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=reverse)
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        jax_sft.load(folder)
    return str(error.value)


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_returns_bit_for_bit_from_every_mesh(make_model, tmp_path, family, mesh):
    folder = make_model(**FAMILIES[family])
    assert there_and_back(folder, tmp_path / "out", mesh) == ["model.safetensors"]
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_dtype_returns_bit_for_bit(make_model, tmp_path, dtype):
    folder = make_model(dtype=dtype)
    extremes = [0.0, -0.0, np.inf, -np.inf, 1e-40, -1e-40, 6e-8, 65504.0, 1.0, 1 + 2**-7]

    def add_extremes(tensors):
        row = tensors[DOWN][0]
        row[: len(extremes)] = np.array(extremes).astype(row.dtype)

    rewrite(folder, add_extremes)
    there_and_back(folder, tmp_path / "out", "fsdp_tensor")
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_expert_returns_bit_for_bit_from_and_to_several_files(
    make_model, tmp_path, family, dtype
):
    folder = make_model(dtype=dtype, **FAMILIES[family])
    names = [name for name in all_tensors(folder) if ".experts." in name]
    assert len(names) == 3 * 3 * (5 if family == "mixtral" else 3)  # layers, matrices, experts
    split(folder, 3)
    files = there_and_back(folder, tmp_path / "out", "all_axes", shard_bytes=30_000)
    assert len(files) > 3
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_tensors_that_hold_several_parameters_return_bit_for_bit(make_model, tmp_path, dtype):
    folder = make_model(**FAMILIES["phi3"], dtype=dtype)
    split(folder, 3)
    files = there_and_back(folder, tmp_path / "out", "all_axes", shard_bytes=30_000)
    assert len(files) > 3
    assert_same_bits(folder, tmp_path / "out")


def test_each_tensor_keeps_its_own_dtype(make_model, tmp_path):
    folder = make_model(**LLAMA)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16]

    def mix(tensors):
        return {
            name: tensor.astype(dtypes[number % 3])
            for number, (name, tensor) in enumerate(sorted(tensors.items()))
        }

    rewrite(folder, mix)
    split(folder, 2)
    there_and_back(folder, tmp_path / "out", "all_axes")
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "out").values()} == set(
        map(np.dtype, dtypes)
    )
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.parametrize("reverse", [False, True])
def test_tensors_are_found_in_several_files(make_model, tmp_path, reverse):
    folder = make_model(dtype="BF16")
    split(folder, 3, reverse)
    assert there_and_back(folder, tmp_path / "out", "fsdp") == ["model.safetensors"]
    assert_same_bits(folder, tmp_path / "out")


def test_files_without_an_index_are_all_read(make_model, tmp_path):
    folder = make_model()
    split(folder, 2)
    (folder / INDEX).unlink()
    there_and_back(folder, tmp_path / "out", "one_device")
    assert_same_bits(folder, tmp_path / "out")


def test_files_that_the_index_does_not_name_are_not_read(make_model, tmp_path):
    folder = make_model()
    split(folder, 2)
    save_file({"tok_embeddings.weight": np.zeros((2, 3))}, folder / "consolidated.safetensors")
    there_and_back(folder, tmp_path / "out", "one_device")
    (folder / "consolidated.safetensors").unlink()
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_saved_by_transformers_in_shards_returns_bit_for_bit(make_model, tmp_path, family):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        make_model("first", **FAMILIES[family]), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    there_and_back(tmp_path / "theirs", tmp_path / "out", "all_axes")
    assert_same_bits(tmp_path / "theirs", tmp_path / "out")


def test_transformers_loads_the_result_without_missing_or_unexpected_weights(make_model, tmp_path):
    folder = make_model(**LLAMA, dtype="BF16")
    there_and_back(folder, tmp_path / "out", "fsdp", shard_bytes=30_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.bfloat16
    before = all_tensors(folder)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.float().numpy(), before[name].astype(np.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template and tokenizer("ab").input_ids


def test_loading_in_bfloat16_rounds_to_nearest(make_model):
    folder = make_model()
    rows, dims, tensors = read(folder)
    shardings = placement.shardings(rows, single_device_mesh())
    exact = hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False)
    rounded = hf_reader.load(tensors, rows, dims, shardings, ml_dtypes.bfloat16, progress=False)
    for path, array in rounded.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, np.asarray(exact[path]).astype(ml_dtypes.bfloat16))


# ---- sharded export ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 10_000, 40_000, 100_000])
def test_a_file_is_over_the_limit_only_when_it_holds_one_tensor(make_model, tmp_path, limit):
    folder, out = make_model(**LLAMA), tmp_path / "out"
    files = there_and_back(folder, out, "fsdp", shard_bytes=limit)
    assert files[-1] == INDEX and len(files) > 2
    for file in files[:-1]:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    # Neighbours that would fit together are together: no more files than needed.
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files[:-1]]
    firsts = [next(iter(_names_in_order(out / file))) for file in files[:-1]]
    tensors = all_tensors(out)
    for size, following in zip(sizes, firsts[1:], strict=False):
        assert size + tensors[following].nbytes > limit
    assert_same_bits(folder, out)


def _names_in_order(file: Path) -> list[str]:
    """Names of a safetensors file by their offset, from its header."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def test_the_index_names_every_tensor_and_its_file(make_model, tmp_path):
    folder, out = make_model(dtype="BF16"), tmp_path / "out"
    files = there_and_back(folder, out, "one_device", shard_bytes=20_000)
    count = len(files) - 1
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert files == [*names, INDEX]
    assert sorted(path.name for path in out.glob("*.safetensors*")) == sorted(files)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {
        tensor: file for file in names for tensor in load_file(out / file)
    }
    total = sum(tensor.nbytes for tensor in all_tensors(folder).values())
    assert index["metadata"]["total_size"] == total
    assert_same_bits(folder, out)


def test_the_data_of_a_file_starts_at_a_multiple_of_8_bytes(make_model, tmp_path):
    files = there_and_back(make_model(), tmp_path / "out", "one_device", shard_bytes=40_000)
    for file in files[:-1]:
        assert int.from_bytes((tmp_path / "out" / file).read_bytes()[:8], "little") % 8 == 0


# ---- what is read --------------------------------------------------------------------------------


class CountingFile:
    """A safetensors file that notes how much of which tensor is read."""

    def __init__(self, file: Path, framework: str):
        self._opened = safe_open(file, framework=framework)

    def get_slice(self, name: str):
        part = self._opened.get_slice(name)

        class Slice:
            def __getitem__(self, index):
                block = part[index]
                READ.append((name, block.size))
                return block

        return Slice()


READ: list[tuple[str, int]] = []


@pytest.mark.parametrize("mesh", ["data", "fsdp", "all_axes"])
def test_only_the_blocks_of_the_shards_are_read_and_each_once(make_model, monkeypatch, mesh):
    # So a process that holds one of eight devices reads an eighth of each fsdp-sharded matrix.
    folder = make_model(**LLAMA)
    rows, dims, tensors = read(folder)
    shardings = placement.shardings(rows, make_mesh(MESHES[mesh]))
    monkeypatch.setattr(hf_reader, "safe_open", CountingFile)
    READ.clear()
    params = hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False)
    for row in rows:
        shards = params[row.path].addressable_shards
        distinct = {str(shard.index): shard.data.size for shard in shards}.values()
        assert sum(distinct) == math.prod(row.shape(dims))
        names = [name for _, name in row.hf_tensors(dims)]
        for name in names:  # a stacked parameter reads its share of each layer's tensor
            sizes = sorted(size for read_name, size in READ if read_name == name)
            assert sizes == sorted(size // len(names) for size in distinct), name


def test_loading_peaks_at_one_parameter_of_host_memory(tmp_path):
    # 16 layers of 128 x 256: the largest stacked parameter takes 2 of the model's 9.3 MiB. A block
    # that happens to be aligned becomes the CPU device's array without a copy: what is left at the
    # end are such blocks.
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    config = tiny.CONFIG | sizes | {"num_hidden_layers": 16}
    tiny.write_model(folder, config)
    rows, dims, tensors = read(folder)
    shardings = placement.shardings(rows, make_mesh({"fsdp": 8}))
    hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False)
    whole = 4 * sum(math.prod(row.shape(dims)) for row in rows)
    largest = 4 * max(math.prod(row.shape(dims)) for row in rows)
    assert largest < whole / 4
    tracemalloc.start()
    params = hf_reader.load(tensors, rows, dims, shardings, ml_dtypes.bfloat16, progress=False)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(params) == len(rows)
    assert peak - left < 1.5 * largest


# ---- folders that do not fit ---------------------------------------------------------------------


def test_all_problems_of_a_folder_are_in_one_message(make_model):
    folder = make_model(**LLAMA)
    gate = "model.layers.0.mlp.gate_proj.weight"
    bias = "model.layers.2.self_attn.q_proj.bias"
    up = "model.layers.0.mlp.up_proj.weight"
    norm = "model.norm.weight"

    def spoil(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"] = tensors[up]
        tensors["visual.patch_embed.weight"] = np.zeros((3, 5), np.float32)
        tensors[DOWN] = np.ascontiguousarray(tensors[DOWN].T)
        tensors[gate] = tensors[gate].reshape(-1)
        tensors[bias] = tensors[bias].astype(np.int64)
        del tensors[norm], tensors["lm_head.weight"]

    rewrite(folder, spoil)
    split(folder, 2)
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    twice = up
    other = second if index[twice] == first else first
    rewrite(folder, lambda t: t | {twice: load_file(folder / index[twice])[twice]}, other)

    lines = refusal(folder).splitlines()
    expected = [
        [index["visual.patch_embed.weight"], "visual.patch_embed.weight", "(3, 5)"],
        [index["model.layers.3.mlp.up_proj.weight"], "model.layers.3.mlp.up_proj.weight"],
        [index[DOWN], DOWN, "(80, 48)", "(48, 80)"],
        [index[gate], gate, "(3840,)", "(80, 48)"],
        [index[bias], bias, "I64"],
        [norm, "(48,)", "missing"],
        ["lm_head.weight", "(272, 48)", "missing", "tie_word_embeddings"],
        [twice, first, second],
    ]
    for words in expected:
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert len(lines) == 1 + len(expected)
    assert str(folder) in lines[0]


def test_a_tensor_of_several_parameters_is_reported_once_by_its_name(make_model):
    folder = make_model(**FAMILIES["phi3"])
    qkv, up = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"

    def spoil(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"] = tensors.pop(qkv)[:80]
        tensors[up] = tensors[up][:80]

    rewrite(folder, spoil)
    _, *lines = refusal(folder).splitlines()
    expected = [
        ["model.layers.1.self_attn.q_proj.weight", "not part"],
        [up, "(80, 48)", "(160, 48)"],
        [qkv, "(160, 48)", "missing"],
    ]
    assert len(lines) == len(expected)
    for words in expected:
        assert any(all(word in line for word in words) for line in lines), (words, lines)


def test_a_long_list_of_problems_is_cut_and_counted(make_model):
    folder = make_model(num_hidden_layers=3)
    edit_config(folder, num_hidden_layers=103)
    lines = refusal(folder).splitlines()
    assert len(lines) < 60
    assert lines[-1].strip() == f"... and {12 * 100 - 50} more"


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_a_tensor_that_is_not_floating_is_refused(make_model, dtype):
    folder = make_model()
    rewrite(folder, lambda tensors: tensors | {DOWN: tensors[DOWN].astype(dtype)})
    assert f"model.safetensors: {DOWN} has dtype" in refusal(folder)


def test_computed_buffers_of_old_exports_are_ignored(make_model):
    folder = make_model()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    rewrite(folder, lambda tensors: tensors | buffer)
    assert jax_sft.load(folder).params


@pytest.mark.parametrize("in_one_file", [True, False])
def test_a_copy_of_the_head_is_accepted_in_a_tied_model(make_model, tmp_path, in_one_file):
    folder = make_model(dtype="BF16")
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors[EMBED]})
    if not in_one_file:
        split(folder, 5)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        assert weight_map[EMBED] != weight_map["lm_head.weight"]
    there_and_back(folder, tmp_path / "out", "fsdp")
    before, after = all_tensors(folder), all_tensors(tmp_path / "out")
    del before["lm_head.weight"]
    assert before.keys() == after.keys()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


@pytest.mark.parametrize("change", ["one_bit", "shape"])
def test_a_head_that_differs_is_refused_in_a_tied_model(make_model, change):
    folder = make_model()

    def add_head(tensors):
        head = tensors[EMBED].copy()
        if change == "one_bit":
            head.view(np.int32)[-1, -1] ^= 1
        return tensors | {"lm_head.weight": head if change == "one_bit" else head[:-1]}

    rewrite(folder, add_head)
    message = refusal(folder)
    assert "model.safetensors: lm_head.weight" in message and "tie_word_embeddings" in message


def test_an_untied_model_without_a_head_is_told_of_tying(make_model):
    folder = make_model()
    edit_config(folder, tie_word_embeddings=False)
    message = refusal(folder)
    assert "lm_head.weight (272, 48) is missing" in message and "tie_word_embeddings" in message


def test_pickled_weights_are_refused_with_the_way_out(make_model):
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "safe_serialization" in message


def test_pickles_beside_the_weights_are_named_and_left_alone(make_model):
    folder = make_model()
    for name in ("training_args.bin", "optimizer.pt", "notes.txt"):
        (folder / name).write_bytes(b"not to be read")
    assert hf_folder.pickles(folder) == ["optimizer.pt", "training_args.bin"]
    assert hf_folder.resolve(str(folder)) == folder and hf_reader.read_headers(folder)[1] == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(make_model, tmp_path, name):
    folder, outside = make_model(), tmp_path / "outside"
    outside.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../outside")
    with pytest.raises(ValueError, match=f"{name} -> .*outside"):
        hf_folder.resolve(str(folder))


def test_links_within_a_folder_and_within_the_cache_of_the_hub_are_followed(make_model, tmp_path):
    folder, cache = make_model(), tmp_path / "models--a--b"
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (tmp_path / "linked").symlink_to(folder)
    assert hf_folder.resolve(str(tmp_path / "linked"))
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/1234").mkdir(parents=True)
    (folder / "model.safetensors").rename(cache / "blobs/5678")
    (cache / "snapshots/1234/model.safetensors").symlink_to("../../blobs/5678")
    assert hf_folder.resolve(str(cache / "snapshots/1234"))
    (cache / "snapshots/1234/config.json").symlink_to("../../../outside")
    with pytest.raises(ValueError, match="links out of the folder"):
        hf_folder.resolve(str(cache / "snapshots/1234"))


def test_a_folder_without_weights_is_refused(make_model):
    folder = make_model()
    (folder / "model.safetensors").unlink()
    assert str(folder) in refusal(folder) and "safetensors" in refusal(folder)


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(make_model, tmp_path, outside):
    folder = make_model()
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBED: outside}}))
    message = refusal(folder)
    assert outside in message and INDEX in message


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_a_corrupt_index_is_refused(make_model, content):
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -100_000, -1])
def test_a_truncated_file_is_refused(make_model, kept):
    folder = make_model()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    assert "model.safetensors cannot be read" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_one_truncated_shard_is_refused(make_model, kept):
    folder = make_model()
    split(folder, 2)
    file = "model-00002-of-00002.safetensors"
    (folder / file).write_bytes((folder / file).read_bytes()[:kept])
    assert f"{file} cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"qwen2"', b"\xff\xfe", b"{}", b'{"model_type": null}']
)
def test_a_corrupt_config_is_refused(make_model, content):
    folder = make_model()
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert "config.json" in message or "model_type" in message


def test_a_folder_without_config_is_refused(make_model):
    folder = make_model()
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")
