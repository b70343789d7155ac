"""Weights in 4 bits: the published codes, the formula in float64, and a model that uses them."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from scipy.stats import norm

import jax_sft
from jax_sft import validate
from jax_sft.adapters import nf4
from jax_sft.files import step_folders
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training.program import program
from tests.adapters.test_lora import TOKENS, losses_of

# Numbers of inputs that are multiples of a block, yet of no two alike.
SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}


def test_the_codes_are_quantiles_of_a_normal_distribution():
    # Appendix E of the paper, with the offset of bitsandbytes: 8 below zero, 7 above and zero.
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort([*below, 0.0, *above])
    np.testing.assert_allclose(nf4.CODES, expected / expected.max(), rtol=0, atol=2e-7)


def by_the_formula(weight: np.ndarray) -> np.ndarray:
    """What a tensor [outputs, inputs] of a file becomes, in float64 and loops."""
    found = np.empty(weight.shape)
    blocks = weight.astype(np.float64).reshape(len(weight), -1, 64)
    largest = np.abs(blocks).max(-1)
    mean = largest.mean()
    for output, of_output in enumerate(blocks):
        scale = np.abs(largest[output] - mean).max() / 127
        for place, block in enumerate(of_output):
            stored = np.rint((largest[output, place] - mean) / scale) * scale + mean
            distances = np.abs(block[:, None] / largest[output, place] - np.array(nf4.CODES))
            found[output, 64 * place : 64 * place + 64] = (
                np.array(nf4.CODES)[distances.argmin(1)] * stored
            )
    return found


@pytest.mark.parametrize("inputs_last", [True, False])
def test_values_equal_the_formula_in_float64(inputs_last):
    weight = np.random.default_rng(0).standard_normal((24, 320)).astype(np.float32)
    kernel = weight if inputs_last else weight.T
    parts = nf4.quantize(jax.numpy.array(kernel), inputs_last)
    assert parts["codes"].size == weight.size // 2 and parts["codes"].dtype == np.uint8
    assert parts["magnitudes"].size == weight.size // 64
    found = np.asarray(nf4.dequantize(parts, inputs_last))
    expected = by_the_formula(weight)
    np.testing.assert_allclose(found if inputs_last else found.T, expected, rtol=0, atol=2e-6)
    error = np.abs(expected - weight).mean() / np.abs(weight).mean()
    assert 0.08 < error < 0.1  # of 4 bits; 8 bits would have 0.006, two 0.5


def test_a_block_of_zeros_stays_zero():
    kernel = np.zeros((128, 3), np.float32)
    kernel[64:, 1] = 2.0
    found = np.asarray(nf4.dequantize(nf4.quantize(jax.numpy.array(kernel), False), False))
    np.testing.assert_allclose(found, kernel, atol=0.02)
    assert (found[:64] == 0).all() and np.isfinite(found).all()


def config(make_config, folder, **changes):
    options = {"lora.rank": 4, "lora.quantize": "nf4", "train.steps": 4, "train.export": True}
    return make_config(folder, **options | {"optimizer.learning_rate": 1e-2} | changes)


@pytest.mark.slow
def test_a_run_on_weights_in_4_bits_equals_one_on_what_they_stand_for(
    make_strong_model, make_config, tmp_path
):
    padded = {"vocab_size": 269, "tie_word_embeddings": False}  # to 270
    folder = make_strong_model(model_type="qwen2", **SIZES, **padded)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.copy_(torch.tensor(by_the_formula(parameter.numpy())))
    shutil.copytree(folder, tmp_path / "rounded")
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    save_file(weights, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    mesh = {"mesh.fsdp": 1, "mesh.tensor": 2, "mesh.data": 4}
    packed = config(make_config, folder, **mesh)
    jax_sft.train(packed, tmp_path / "packed")
    plain = config(make_config, tmp_path / "rounded", **mesh | {"lora.quantize": ""})
    jax_sft.train(plain, tmp_path / "plain")
    losses = losses_of(tmp_path / "packed")
    np.testing.assert_allclose(losses, losses_of(tmp_path / "plain"), rtol=1e-5)
    # Checkpoints hold adapters alone; merged, they are beside what they were trained with.
    arrays = step_folders.params(tmp_path / "packed" / "checkpoints", 4)
    assert all(".lora." in path for path in arrays)
    merged = jax_sft.export(tmp_path / "packed" / "checkpoints", tmp_path / "merged", merge=True)
    adapter = tmp_path / "packed" / "export"
    unmerged = jax_sft.load(tmp_path / "rounded", adapter=adapter).logits(TOKENS)
    np.testing.assert_allclose(jax_sft.load(merged).logits(TOKENS), unmerged, rtol=0, atol=1e-4)
    on_others = jax_sft.load(folder, adapter=adapter).logits(TOKENS)
    assert np.abs(on_others - unmerged).max() > 0.1
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4


def test_no_kernel_of_a_layer_is_held_in_more_than_its_bits(make_model, make_config):
    cfg = config(
        make_config, make_model(**SIZES), **{"lora.dora": True, "mesh.fsdp": 1, "mesh.data": 8}
    )
    resolved = validate.validate(cfg, 8)
    state = program(resolved, make_mesh(resolved.mesh_shape), 4).state
    kernels = {path: array for path, array in state.frozen.items() if ".kernel." in path}
    assert {path.rsplit(".", 1)[1] for path in kernels} == set(nf4.PARTS)
    assert not any(path.endswith(".kernel") for path in state.frozen)
    elements = 2 * 64 * (4 * 32 + 2 * 2 * 32 + 3 * 256 + 4 * 32)
    held = sum(array.size * array.dtype.itemsize for array in kernels.values())
    assert 0.5 < held / elements < 0.6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.quantize": "int8"}, ["lora.quantize = 'int8'", "nf4"]),
        ({"lora.rank": 0}, ["lora.quantize", "set lora.rank"]),
        ({"mesh.fsdp": 8, "mesh.data": 1}, ["embed/64 = 1", "mesh.fsdp"]),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused(make_model, make_config, changes, words):
    cfg = config(make_config, make_model(**SIZES), **{"mesh.fsdp": 1, "mesh.data": 8} | changes)
    with pytest.raises(ValueError) as error:
        validate.validate(cfg, 8)
    assert all(word in str(error.value) for word in words), error.value


def test_a_layer_whose_inputs_are_no_whole_blocks_is_refused(make_model, make_config):
    cfg = config(make_config, make_model(**SIZES | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match=r"down_proj.weight has 80 inputs, no multiple of 64"):
        validate.validate(cfg, 8)
