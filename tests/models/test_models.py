"""Every family computes what transformers computes, and its file keeps the family contract.

The reference is transformers in float32 on the CPU; weights are large (`make_strong_model`), so
logits are of order 1 and each part of the model moves them by far more than the tolerance.
"""

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jax_sft
from jax_sft import models
from jax_sft.nn.rope import Rope
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from jax_sft.weights import tree
from tests import tiers

TOLERANCE = 1e-4  # largest absolute difference of float32 logits of order 1
VOCAB = 272
LENGTH = 200  # tokens; beyond ORIGINAL, within max_position_embeddings
ORIGINAL = 64  # original_max_position_embeddings of the scaled variants
THETA = 5000.0

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
# Each differs from all others in its frequencies or its factor on cos and sin.
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3_without_original": {k: LLAMA3[k] for k in LLAMA3 if not k.startswith("original")},
    "yarn": YARN,
    "yarn_factor_8": YARN | {"factor": 8.0},
    "yarn_attention_factor": YARN | {"attention_factor": 0.7},
    "yarn_mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4},
    "yarn_untruncated": YARN | {"truncate": False},
    "yarn_betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.25},
    "yarn_betas_untruncated": YARN | {"beta_fast": 4.0, "beta_slow": 0.25, "truncate": False},
    "longrope": {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        **{"short_factor": [1.0 + n / 9 for n in range(16)], "long_factor": [*range(1, 17)]},
    },
}
# Other ways to write a variant: {name: (variant of ROPES, fields of config.json)}.
SPELLINGS = {
    "yarn_one_mscale": ("yarn", {"rope_scaling": YARN | {"mscale": 0.8}, "rope_theta": THETA}),
    "yarn_null_factor": (
        "yarn",
        {"rope_parameters": YARN | {"factor": None, "rope_theta": THETA}},
    ),
    "yarn_original_beside": (
        "yarn",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": THETA},
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "type_for_rope_type": (
        "linear",
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": THETA},
    ),
    "theta_beside_parameters": (
        "linear",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": THETA},
    ),
    "null_scaling": ("default", {"rope_scaling": None, "rope_theta": THETA}),
    "yarn_finetuned": ("yarn", {"rope_scaling": YARN | {"finetuned": True}, "rope_theta": THETA}),
    # vLLM multiplies by attn_factor, transformers reads attention_factor alone.
    "yarn_of_two_engines": (
        "yarn_attention_factor",
        {"rope_parameters": YARN | {"attention_factor": 0.7, "attn_factor": 0.7 / 1.138629436}}
        | {"rope_theta": THETA},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tensors this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def newer(variant: str) -> dict:
    """Fields of config.json for a variant, as transformers 5 writes them."""
    return {"rope_parameters": ROPES[variant] | {"rope_theta": THETA}}


def older(variant: str) -> dict:
    """The same as transformers 4 wrote them."""
    return {"rope_scaling": ROPES[variant], "rope_theta": THETA}


def random_tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (rows, length))


def their_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def their_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return their_model(folder)(torch.tensor(tokens)).logits.numpy()


def assert_same_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    ours, theirs = jax_sft.load(folder).logits(tokens), their_logits(folder, tokens)
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    assert theirs.std() > 0.7  # else the comparison would not say much
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return theirs


# ---- logits equal transformers' ------------------------------------------------------------------

BIASED = {"attention_bias": True, "mlp_bias": True}
GEMMA2 = {
    **{"model_type": "gemma2", "head_dim": 12, "sliding_window": 7, "pad_token_id": None},
    **{"query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
}
GEMMA3 = {
    **{"model_type": "gemma3_text", "head_dim": 12, "sliding_window": 7, "pad_token_id": None},
    **{"query_pre_attn_scalar": 5, "sliding_window_pattern": 2, "rope_theta": THETA},
    "rope_local_base_freq": 70.0,
}
PHI3 = {"model_type": "phi3", "tie_word_embeddings": False, "pad_token_id": None}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
EXPERTS = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
}
ARCHITECTURES = {
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2_head_dim": {"model_type": "qwen2", "head_dim": 20},
    "qwen2_one_kv_head": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen2_all_kv_heads": {"model_type": "qwen2", "num_key_value_heads": 4},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_attention_bias": {"model_type": "llama", "attention_bias": True},
    "llama_mlp_bias": {"model_type": "llama", "mlp_bias": True},
    "llama_both_biases": {"model_type": "llama", "tie_word_embeddings": False, **BIASED},
    "llama_head_dim": {"model_type": "llama", "head_dim": 20, **BIASED},
    "llama_one_kv_head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama_all_kv_heads": {"model_type": "llama", "num_key_value_heads": None},
    "llama_eps": {"model_type": "llama", "rms_norm_eps": 0.1},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 20},
    "qwen3_biased": {
        **{"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "vocab_size": 269},
        **{"tie_word_embeddings": False, "rms_norm_eps": 0.1, "num_key_value_heads": 1},
    },
    "qwen3_without_head_dim": {"model_type": "qwen3", "num_key_value_heads": None},
    "olmo2_tied": {"model_type": "olmo2"},
    "olmo2_biased": {
        **{"model_type": "olmo2", "head_dim": 20, "attention_bias": True, "vocab_size": 269},
        **{"tie_word_embeddings": False, "rms_norm_eps": 0.1, "num_key_value_heads": None},
    },
    "mistral_tied": {"model_type": "mistral", "sliding_window": None},
    "mistral_head_dim": {
        **{"model_type": "mistral", "sliding_window": None, "head_dim": 20, "vocab_size": 269},
        **{"tie_word_embeddings": False, "num_key_value_heads": 1},
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 7},
    "mistral_window_of_one": {"model_type": "mistral", "sliding_window": 1},
    "mistral_window_of_all_but_one": {"model_type": "mistral", "sliding_window": 39},
    # The caps bite: scores and logits are of order 1 to 10.
    "gemma2_tied": GEMMA2,
    "gemma2_biased": {
        **GEMMA2,
        **{"head_dim": 20, "attention_bias": True, "vocab_size": 269, "num_key_value_heads": 1},
        **{"tie_word_embeddings": False, "query_pre_attn_scalar": 7, "rms_norm_eps": 0.1},
    },
    "gemma2_uncapped": {
        **{**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gemma2_without_windows": {**GEMMA2, "layer_types": ["full_attention"] * 3},
    "gemma3_tied": GEMMA3,
    "gemma3_scaled": GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3_nested": {
        **{**GEMMA3, "rope_theta": None, "rope_local_base_freq": None},
        **{"rope_parameters": GEMMA3_ROPES, "final_logit_softcapping": 2.0, "head_dim": 20},
        **{"attention_bias": True, "vocab_size": 269, "num_key_value_heads": 1},
        **{"tie_word_embeddings": False, "query_pre_attn_scalar": 7, "rms_norm_eps": 0.1},
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gemma3_all_windows": {**GEMMA3, "layer_types": ["sliding_attention"] * 3},
    "phi3_untied": PHI3,
    "phi3_tied": {
        **{**PHI3, "tie_word_embeddings": True, "vocab_size": 269, "num_key_value_heads": 1},
        **{"sliding_window": 7, "rms_norm_eps": 0.1},
    },
    "phi3_head_dim": {**PHI3, "head_dim": 20, "num_key_value_heads": None},
    "phi3_partial": {**PHI3, "head_dim": 20, "partial_rotary_factor": 0.72},  # 14 of 20
    "mixtral_tied": {"model_type": "mixtral", "num_local_experts": 5},
    "mixtral_window": {
        **{"model_type": "mixtral", "num_local_experts": 7, "sliding_window": 7, "head_dim": 20},
        **{"tie_word_embeddings": False, "vocab_size": 269, "num_key_value_heads": 1},
    },
    "mixtral_of_all_experts": {
        **{"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 3},
    },
    "qwen3_moe_tied": {
        **{"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 20},
        **{"moe_intermediate_size": 28, "norm_topk_prob": True, "vocab_size": 269},
    },
    "qwen3_moe_biased": {
        **{"model_type": "qwen3_moe", "num_local_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 28, "attention_bias": True, "tie_word_embeddings": False},
    },
}


# One of each family, with what most of the others have one by one.
FAST_ARCHITECTURES = [
    *["qwen2_tied", "llama_both_biases", "qwen3_biased", "olmo2_biased", "mistral_window"],
    *["gemma2_biased", "gemma3_nested", "phi3_tied", "mixtral_window", "qwen3_moe_biased"],
]


@pytest.mark.parametrize("name", tiers.fast(FAST_ARCHITECTURES, ARCHITECTURES))
def test_logits_equal_transformers(make_strong_model, name):
    tokens = random_tokens(length=40) % ARCHITECTURES[name].get("vocab_size", VOCAB)
    assert_same_logits(make_strong_model(**ARCHITECTURES[name]), tokens)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "moe" in name or "mix" in name])
def test_the_routing_that_is_compared_is_uneven(make_strong_model, name):
    """An expert has no token, others more than their share; or each has all."""
    options = ARCHITECTURES[name]
    tokens = random_tokens(length=40) % options.get("vocab_size", VOCAB)
    model = their_model(make_strong_model(**options))
    with torch.no_grad():
        routed = model(torch.tensor(tokens), output_router_logits=True).router_logits
    num_chosen = model.config.num_experts_per_tok
    for logits in routed:
        chosen = logits.topk(num_chosen).indices
        counts = chosen.flatten().bincount(minlength=logits.shape[-1]).tolist()
        if num_chosen == logits.shape[-1]:
            assert counts == [tokens.size] * num_chosen
        else:
            assert counts[-1] == 0 and max(counts) > 1.4 * np.mean(counts)


@pytest.mark.parametrize(
    ("family", "variant"),
    # The frequencies and the factor of each variant are compared by test_angles_equal_transformers.
    tiers.fast(
        [("llama", "llama3"), ("gemma2", "yarn_mscale")],
        [
            *[("qwen2", variant) for variant in ("default", "linear", "llama3", "yarn")],
            *[
                ("qwen2", variant)
                for variant in ("yarn_attention_factor", "yarn_betas_untruncated")
            ],
            *[("llama", variant) for variant in ("default", "linear", "llama3", "yarn_mscale")],
            *[("qwen3", variant) for variant in ("linear", "llama3", "yarn")],
            *[("olmo2", variant) for variant in ("linear", "llama3", "yarn_betas")],
            *[("mistral", variant) for variant in ("linear", "llama3", "yarn_mscale")],
            ("gemma2", "yarn_mscale"),
            *[("mixtral", "yarn"), ("qwen3_moe", "yarn")],
        ],
    ),
)
def test_logits_with_scaled_rope_equal_transformers(make_strong_model, family, variant):
    spelled = older(variant) if family in ("llama", "olmo2", "qwen3_moe") else newer(variant)
    options = {"model_type": family, "head_dim": 32, "num_hidden_layers": 2, "rope_theta": THETA}
    options |= {"sliding_window": 90} if family == "mistral" else {}
    options |= {**GEMMA2, "head_dim": 32, "sliding_window": 90} if family == "gemma2" else {}
    options |= EXPERTS.get(family, {})
    plain = make_strong_model("plain", **options)
    scaled = make_strong_model("scaled", **options | {"rope_theta": None} | spelled)
    logits = assert_same_logits(scaled, random_tokens())
    if variant != "default":  # the check would notice a variant that is left out
        assert np.abs(logits - their_logits(plain, random_tokens())).max() > 1


SHORT, LONG = [1.0, 1.1, 1.3, 1.2, 1.5, 1.9], [1.0, 1.4, 2.5, 6.0, 15.0, 40.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
LONGROPES = {
    "older": {"rope_scaling": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "su": {
        # transformers wants the length within too, but takes the one beside.
        "rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 8},
        "original_max_position_embeddings": ORIGINAL,
    },
    "newer": {
        "rope_parameters": LONGROPE | {"rope_type": "longrope", "rope_theta": THETA, "factor": 2.0},
        "original_max_position_embeddings": ORIGINAL,
    },
    "partial": {
        "rope_scaling": LONGROPE | {"short_factor": SHORT[:4], "long_factor": LONG[:4]},
        **{"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 0.67},
    },
    "attention_factor": {
        "rope_scaling": LONGROPE | {"attention_factor": 0.7},
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.mark.parametrize("spelling", tiers.fast(["partial"], LONGROPES))
def test_longrope_logits_beyond_the_original_length_equal_transformers(make_strong_model, spelling):
    folder = make_strong_model(**PHI3 | {"num_hidden_layers": 2} | LONGROPES[spelling])
    assert_same_logits(folder, random_tokens(length=ORIGINAL + 1))


@pytest.mark.parametrize("given", [{}, {"original_max_position_embeddings": 64}])
def test_the_original_length_of_a_phi3_is_that_of_transformers(given):
    fields = {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 8}} | given
    theirs = transformers.AutoConfig.for_model(
        "phi3", **json.loads(json.dumps(ODD_CONFIG | fields))
    )
    original = theirs.rope_parameters["original_max_position_embeddings"]
    assert (
        read_config("phi3", **fields).rope.longest_short
        == original
        == max(given.values(), default=4096)
    )


def test_each_segment_decides_by_its_own_length_which_factors_of_longrope_it_takes(
    make_strong_model,
):
    # transformers takes the longest of the batch for all: so each alone, here in one row.
    folder = make_strong_model(**PHI3 | {"num_hidden_layers": 2} | LONGROPES["older"])
    lengths = (ORIGINAL, ORIGINAL + 1, 9)
    tokens = random_tokens(1, sum(lengths))
    packed = jax_sft.load(folder).logits(tokens, np.repeat([[7, 3, 900]], lengths, axis=1))
    ends = np.cumsum(lengths)
    for end, length in zip(ends, lengths, strict=True):
        part = slice(end - length, end)
        alone = their_logits(folder, tokens[:, part])
        np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=TOLERANCE)
    together = their_logits(folder, tokens)
    assert np.abs(packed - together)[:, :ORIGINAL].max() > 0.1


def test_greedy_answers_take_the_factors_of_longrope_by_the_length_so_far(make_strong_model):
    folder = make_strong_model(**PHI3 | {"num_hidden_layers": 2} | LONGROPES["older"])
    model, prompt = jax_sft.load(folder), random_tokens(1, ORIGINAL - 2)[0].tolist()
    answer = model.greedy([prompt], 4, [])[0]
    for number, token in enumerate(answer):
        logits = their_logits(folder, np.array([prompt + answer[:number]]))[0, -1]
        assert token == logits.argmax()


SAVED = [
    *[("llama", {}), ("olmo2", {}), ("mistral", {"sliding_window": None, "head_dim": 20})],
    *[("qwen3", {"head_dim": 20, "max_window_layers": 1}), ("mistral", {"sliding_window": 30})],
    ("gemma2", {"sliding_window": 30, "head_dim": 20, "pad_token_id": 0}),
    ("gemma3_text", {"sliding_window": 30, "head_dim": 20, "rope_parameters": GEMMA3_ROPES}),
    ("phi3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | LONGROPES["newer"]),
    *[("mixtral", {"num_local_experts": 5}), ("qwen3_moe", EXPERTS["qwen3_moe"])],
]


# The tensors of each family are those that transformers writes: see the contract of a family below.
@pytest.mark.parametrize(
    ("family", "options"),
    [saved if saved[0] in ("phi3", "qwen3_moe") else tiers.full(*saved) for saved in SAVED],
)
def test_logits_of_a_model_saved_by_transformers_equal_its_own(tmp_path, family, options):
    config = transformers.AutoConfig.for_model(
        family,
        **dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256),
        **dict(rope_parameters=LLAMA3 | {"rope_theta": THETA}, initializer_range=0.2) | options,
    )
    torch.manual_seed(0)  # other random weights may exceed the tolerance: 1.01e-4 at seed 8
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_same_logits(tmp_path, random_tokens())


# ---- RoPE ----------------------------------------------------------------------------------------

ALL_SPELLINGS = {
    **{f"{variant}_newer": (variant, newer(variant)) for variant in ROPES},
    **{f"{variant}_older": (variant, older(variant)) for variant in ROPES},
    **SPELLINGS,
}


def read_rope(fields: dict, head_dim: int = 32) -> Rope:
    return Rope.from_hf({"max_position_embeddings": 256, **fields}, head_dim)


@pytest.mark.parametrize("spelling", ALL_SPELLINGS)
def test_angles_equal_transformers(spelling):
    fields = ALL_SPELLINGS[spelling][1]
    sizes = dict(hidden_size=96, num_attention_heads=4, head_dim=32, max_position_embeddings=256)
    config = transformers.LlamaConfig(**sizes, **json.loads(json.dumps(fields)))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = np.array([[0, 1, 5, ORIGINAL, 255, 256, 1000]])
    cos, sin = read_rope(fields).angles(jnp.array(positions), jnp.ones(positions.shape, int), 1)
    their_cos, their_sin = rotary(torch.zeros(1), torch.tensor(positions))
    for ours, theirs in ((cos, their_cos), (sin, their_sin)):  # theirs: both halves, no head axis
        assert ours.shape == (1, 7, 1, 16)
        # A float32 frequency is exact to 6e-8; times position 1000 that is 6e-5 of an angle.
        np.testing.assert_allclose(ours[:, :, 0], theirs[..., :16], rtol=0, atol=2e-4)
    rope = read_rope(fields)
    np.testing.assert_allclose(rope.long_inv_freq or rope.inv_freq, rotary.inv_freq, rtol=5e-7)


def test_rope_variants_all_differ_and_spellings_do_not():
    ropes = {variant: read_rope(newer(variant)) for variant in ROPES}
    assert len(set(ropes.values())) == len(ROPES)
    for spelling, (variant, fields) in ALL_SPELLINGS.items():
        assert read_rope(fields) == ropes[variant], spelling


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, ["dynamic", "linear", "llama3", "yarn"]),
        ({"type": "longrope", "factor": 2.0}, ["longrope", "short_factor"]),
        (LONGROPE, ["short_factor has 6 numbers", "32 rotated dimensions"]),
        (LONGROPE | {"short_factor": [1] * 16, "long_factor": [1] * 15 + [0]}, ["long_factor"]),
        (YARN | {"short_factor": [1] * 16}, ["yarn", "short_factor"]),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, ["linear", "beta_fast"]),
        (YARN | {"extrapolation": 3}, ["yarn", "extrapolation"]),
        (YARN | {"attn_factor": 0.8782488562869419}, ["attn_factor", "add attention_factor = 1,"]),
        ({"rope_type": "linear"}, ["linear", "factor"]),
        ({"rope_type": "yarn"}, ["yarn", "factor"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["llama3", "low_freq_factor"]),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_type": "default", "mrope_section": [1, 2]}, ["default", "mrope_section"]),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, ["rope_type", "type", "keep"]),
        ({"rope_type": ["yarn"]}, ["rope type", "yarn"]),
        ({"rope_type": "linear", "factor": 0.5}, ["factor = 0.5"]),
        ({"rope_type": "linear", "factor": math.inf}, ["factor = inf"]),
        ({"rope_type": "linear", "factor": True}, ["factor = True"]),
        (YARN | {"original_max_position_embeddings": 0}, ["original_max_position_embeddings = 0"]),
        (YARN | {"original_max_position_embeddings": 64.0}, ["original_max_position_embeddings"]),
        (YARN | {"factor": None, "original_max_position_embeddings": 512}, ["original_max", "512"]),
        (YARN | {"beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast = 1.0", "beta_slow = 2.0"]),
        (YARN | {"truncate": 1}, ["truncate = 1"]),
        (YARN | {"attention_factor": 1e30}, ["attention_factor"]),
        ([], ["one flat object"]),
        (False, ["one flat object"]),
        ("yarn", ["one flat object"]),
        ({"full_attention": {"rope_theta": THETA}}, ["full_attention"]),  # one per layer type
    ],
)
def test_rope_that_is_not_implemented_is_refused(scaling, words):
    for fields in ({"rope_scaling": scaling, "rope_theta": THETA}, {"rope_parameters": scaling}):
        with pytest.raises(ValueError) as error:
            read_rope(fields)
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("scaling", "max_positions", "longest"),
    [
        (YARN, ORIGINAL, 4 * ORIGINAL),  # as Qwen's cards have it
        ({**YARN, "type": "yarn", "rope_type": None}, ORIGINAL, 4 * ORIGINAL),
        (YARN, 80, 4 * ORIGINAL),  # Qwen3: 40,960 positions, 32,768 before scaling
        (YARN, 4 * ORIGINAL, 4 * ORIGINAL),  # raised already
        (YARN, 1000, 1000),
        (YARN | {"factor": None}, 4 * ORIGINAL, 4 * ORIGINAL),
        ({"rope_type": "yarn", "factor": 4.0}, ORIGINAL, 4 * ORIGINAL),
        (YARN | {"factor": 1.5}, ORIGINAL, 96),
        ({"rope_type": "linear", "factor": 4.0}, ORIGINAL, 4 * ORIGINAL),
        ({"rope_type": "default", "factor": 4.0}, ORIGINAL, ORIGINAL),
        (LLAMA3, ORIGINAL, 8 * ORIGINAL),
        (LLAMA3 | {"factor": 32.0}, 16 * ORIGINAL, 16 * ORIGINAL),  # Llama 3.2: no ratio
        (None, ORIGINAL, ORIGINAL),
        ({}, ORIGINAL, ORIGINAL),
    ],
)
def test_examples_are_as_long_as_the_scaling_reaches(scaling, max_positions, longest):
    for spelled in ({"rope_scaling": scaling}, {"rope_parameters": scaling}):
        config = ODD_CONFIG | {"model_type": "qwen2", "max_position_embeddings": max_positions}
        assert models.read(config | spelled)[1].longest == longest


def test_the_length_of_a_gemma3_and_of_a_longrope_is_that_of_their_config():
    scaled = read_config("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert scaled.longest == ODD_CONFIG["max_position_embeddings"]
    for spelling in LONGROPES.values():
        fields = spelling | {"head_dim": 12, "max_position_embeddings": 256}
        assert read_config("phi3", **fields).longest == 256


def test_logits_beyond_max_position_embeddings_equal_transformers(make_strong_model):
    card = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    options = {"head_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": ORIGINAL}
    folder = make_strong_model(rope_scaling=card, **options)
    assert LENGTH > 3 * ORIGINAL
    assert_same_logits(folder, random_tokens(rows=1))


# ---- packing, causality, precision ---------------------------------------------------------------

FAMILIES = {
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **BIASED},
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": False},
    "olmo2": {"model_type": "olmo2", "head_dim": 20, "attention_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 20, "sliding_window": 12},
    "gemma2": GEMMA2 | {"head_dim": 20},
    "gemma3_text": GEMMA3 | {"head_dim": 20},
    "phi3": PHI3 | LONGROPES["partial"] | {"original_max_position_embeddings": 12},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "sliding_window": 12},
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 28, "head_dim": 20, "tie_word_embeddings": False},
    },
}
LENGTHS = (17, 1, 17, 9)  # of the examples that share a row; longer than mistral's window, or not


@pytest.fixture(scope="module")
def loaded_before() -> dict:
    return {}


# Windows in some layers and soft caps, segments that decide by their length, experts.
@pytest.fixture(params=tiers.fast(["gemma2", "phi3", "qwen3_moe"], FAMILIES))
def loaded(request, make_strong_model, loaded_before):
    """A model of each family, loaded and compiled once for all tests."""
    if request.param not in loaded_before:
        folder = make_strong_model(num_hidden_layers=2, **FAMILIES[request.param])
        loaded_before[request.param] = jax_sft.load(folder)
    return loaded_before[request.param]


def packed_row(padding: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[slice]]:
    """Return (tokens, segment ids, positions) [1, T] and the slice of each example."""
    tokens = random_tokens(1, sum(LENGTHS) + padding)
    segments = np.repeat([*range(1, len(LENGTHS) + 1), 0], [*LENGTHS, padding])
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, padding)])
    ends = np.cumsum(LENGTHS)
    parts = [slice(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    return tokens, segments[None], positions[None], parts


def test_packed_examples_equal_each_alone(loaded):
    tokens, segments, positions, parts = packed_row()
    packed = loaded.logits(tokens, segments, positions)
    alone, alone_segments = np.zeros((2, len(parts), max(LENGTHS)), int)  # one in each row
    for row, part in enumerate(parts):
        alone[row, : LENGTHS[row]], alone_segments[row, : LENGTHS[row]] = tokens[0, part], 1
    each = loaded.logits(alone, alone_segments)
    for row, part in enumerate(parts):
        np.testing.assert_allclose(packed[0, part], each[row, : LENGTHS[row]], rtol=0, atol=1e-5)
    unsegmented = loaded.logits(tokens)
    assert np.abs(packed - unsegmented)[:, parts[1].start :].max() > 0.1


def test_positions_are_counted_from_each_segment_start_unless_given(loaded):
    tokens, segments, positions, parts = packed_row()
    counted = loaded.logits(tokens, segments)
    np.testing.assert_array_equal(counted, loaded.logits(tokens, segments, positions))
    stretched = loaded.logits(tokens, segments, 2 * positions)
    assert np.abs(counted - stretched)[:, parts[0]].max() > 0.1


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_a_packed_example_changes_no_bit_of_the_others(loaded, changed):
    tokens, segments, positions, parts = packed_row()
    before = loaded.logits(tokens, segments, positions)
    tokens[:, parts[changed]] = (tokens[:, parts[changed]] + 100) % VOCAB
    after = loaded.logits(tokens, segments, positions)
    for number, part in enumerate(parts):
        if number != changed:
            np.testing.assert_array_equal(before[:, part], after[:, part])
    assert np.abs(before - after)[:, parts[changed]].max() > 0.1


def test_padding_changes_no_bit_of_the_examples(loaded):
    tokens, segments, positions, parts = packed_row()
    before = loaded.logits(tokens, segments, positions)
    tokens[:, parts[-1].stop :] = 3
    after = loaded.logits(tokens, segments, positions)
    end = parts[-1].stop
    np.testing.assert_array_equal(before[:, :end], after[:, :end])


def test_a_later_token_changes_no_bit_of_earlier_logits(loaded):
    tokens = random_tokens(1, 40)
    before = loaded.logits(tokens)
    tokens[:, 25] = (tokens[:, 25] + 1) % VOCAB
    after = loaded.logits(tokens)
    np.testing.assert_array_equal(before[:, :25], after[:, :25])
    assert (np.abs(before - after)[:, 25:].max(axis=-1) > 1e-3).all()


# One has other norms.
@pytest.mark.parametrize("family", tiers.fast(["olmo2"], ["qwen2", "llama", "olmo2"]))
def test_bfloat16_logits_are_within_3_percent_of_float32(make_strong_model, family):
    # Root mean square error over root mean square. One rounding to bfloat16 is up to 0.4 %; three
    # layers of weights without any training add up to 1 to 2 %.
    folder = make_strong_model(**FAMILIES[family])
    tokens = random_tokens(length=64)
    exact = np.asarray(jax_sft.load(folder).logits(tokens))
    rounded = jax_sft.load(folder, dtype="bfloat16").logits(tokens)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.03


# One norms over all heads, one looks how long the segments are.
@pytest.mark.parametrize("family", tiers.fast(["olmo2", "phi3"], ["qwen2", "olmo2", "phi3"]))
def test_logits_do_not_depend_on_the_mesh(make_strong_model, family):
    folder = make_strong_model(**FAMILIES[family])
    tokens, segments, positions, parts = packed_row()
    assert tokens.shape == (1, 51)  # padded to 2 rows of 52 by this mesh
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    alone = jax_sft.load(folder).logits(tokens, segments, positions)
    split = jax_sft.load(folder, mesh).logits(tokens, segments, positions)
    end = parts[-1].stop  # what padding predicts is nobody's concern
    np.testing.assert_allclose(split[:, :end], alone[:, :end], rtol=0, atol=1e-5)


def test_padding_of_a_row_to_the_mesh_is_invisible_to_every_segment_id(make_strong_model):
    folder = make_strong_model()
    tokens = random_tokens(1, 5)  # padded to 8 tokens over sequence = 4
    mesh = make_mesh({"sequence": 4}, jax.devices()[:4])
    whole = jax_sft.load(folder).logits(tokens)
    on_mesh = jax_sft.load(folder, mesh)
    for segment in (0, 1, 7, -1):
        split = on_mesh.logits(tokens, np.full_like(tokens, segment))
        np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [[[0, VOCAB]], [[-1, 0]], [0, 1], [[[0]]]])
def test_tokens_outside_the_vocabulary_or_not_two_dimensional_are_refused(loaded, tokens):
    with pytest.raises(ValueError, match="token"):
        loaded.logits(tokens)


# ---- the contract of a family file ---------------------------------------------------------------

ODD_CONFIG = {
    **{"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
}
# Fields that add or remove weights, by family; a family without an entry is checked tied and not.
OPTIONS = {
    "llama": [{}, {"attention_bias": True}, {"mlp_bias": True}, BIASED],
    "qwen3": [{"head_dim": 12}, {"head_dim": 20, "attention_bias": True}],
    "olmo2": [{}, {"head_dim": 20, "attention_bias": True}],
    "mistral": [{"sliding_window": None}, {"head_dim": 20, "sliding_window": 7}],
    "gemma2": [{}, {"head_dim": 20, "attention_bias": True}],
    "gemma3_text": [{}, {"head_dim": 20, "attention_bias": True}],
    "mixtral": [EXPERTS["mixtral"]],
    "qwen3_moe": [EXPERTS["qwen3_moe"] | {"attention_bias": True}],
}
EVERY_FAMILY = pytest.mark.parametrize("name", models.families())


def variants(name: str):
    family = models.find(name)
    for options in OPTIONS.get(name, [{}]):
        for tied in (True, False):
            config = ODD_CONFIG | {"model_type": name, "tie_word_embeddings": tied} | options
            yield family, family.Config.from_hf(config)


def test_every_family_is_found_and_its_logits_are_compared():
    assert models.families() == sorted(FAMILIES)
    assert {options["model_type"] for options in ARCHITECTURES.values()} == set(FAMILIES)


@EVERY_FAMILY
def test_weight_rows_are_exactly_the_module_tree(name):
    for family, cfg in variants(name):
        module = jax.eval_shape(lambda key, f=family, c=cfg: f.Model(c, key), jax.random.key(0))
        in_module = {path: leaf.shape for path, leaf in tree.to_dict(module).items()}
        rows = family.weights(cfg)
        assert len({row.path for row in rows}) == len(rows)
        assert {row.path: row.shape(cfg.axis_sizes) for row in rows} == in_module


@EVERY_FAMILY
def test_weight_rows_are_exactly_the_tensors_of_transformers(name, tmp_path):
    for family, cfg in variants(name):
        config = {"model_type": name, "tie_word_embeddings": cfg.tied} | ODD_CONFIG
        config |= {"head_dim": cfg.head_dim, "pad_token_id": None}
        config |= {key: getattr(cfg, key) for key in BIASED if hasattr(cfg, key)}
        config |= EXPERTS.get(name, {})
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
        theirs.save_pretrained(tmp_path)  # which takes the experts apart
        written = load_file(tmp_path / "model.safetensors")
        shapes = {key: tensor.shape for key, tensor in written.items()}
        rows = family.weights(cfg)
        ours = {
            key: row.hf_shape(cfg.axis_sizes)
            for row in rows
            for _, key in row.hf_tensors(cfg.axis_sizes)
        }
        assert ours == shapes


@EVERY_FAMILY
def test_every_logical_axis_has_a_sharding_rule_and_a_size(name):
    for family, cfg in variants(name):
        axes = {axis for row in family.weights(cfg) for axis in row.axes}
        assert axes <= rules.RULES.keys() and axes <= cfg.axis_sizes.keys()
        assert {axis for rule in rules.RULES.values() for axis in rule} <= set(rules.AXES)


@EVERY_FAMILY
def test_weight_rows_turn_tensors_into_parameters_and_back(name):
    for family, cfg in variants(name):
        for row in family.weights(cfg):
            shape = row.hf_shape(cfg.axis_sizes)
            theirs = np.arange(np.prod(shape)).reshape(shape)
            whole = tuple((0, cfg.axis_sizes[axis]) for axis in row.axes[len(row.stacked) :])
            theirs = theirs[row.hf_index(whole, cfg.axis_sizes)]
            ours = row.from_hf(theirs, cfg.axis_sizes)
            assert ours.shape == row.shape(cfg.axis_sizes)[len(row.stacked) :]
            np.testing.assert_array_equal(row.to_hf(ours, cfg.axis_sizes), theirs)


@functools.cache
def attributes_read(source: Path) -> set[tuple[str, str]]:
    """Return (owner, attribute) of every attribute that a file reads of `self` or of a `cfg`."""
    return {
        (owner, node.attr)
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if (owner := ast.unparse(node.value)).endswith("cfg") or owner == "self"
    }


@EVERY_FAMILY
def test_every_config_field_is_read(name):
    # By the family's own file, or (max_positions, tied) by what calls it.
    package = Path(inspect.getfile(models)).parents[1]
    other_families = {package / "models" / f"{family}.py" for family in models.families()}
    sources = [*(set(package.rglob("*.py")) - other_families), package / "models" / f"{name}.py"]
    reads = set()
    for source in sources:
        for owner, attribute in attributes_read(source):
            if owner.endswith("cfg") or source.stem in (name, "sizes"):
                reads.add(attribute)
    fields = {field.name for field in dataclasses.fields(models.find(name).Config)}
    assert fields <= reads


# ---- what config.json may say --------------------------------------------------------------------


def read_config(name: str, **changes):
    # A mistral or gemma without sliding_window has one of 4096; a gemma needs one.
    window = 64 if name in OF_LAYER_TYPES else None
    config = ODD_CONFIG | {"model_type": name, "sliding_window": window}
    return models.find(name).Config.from_hf(config | changes)


ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
OF_LAYER_TYPES = ACTIVATIONS.keys() & set(
    models.families()
)  # families whose layers need not be equal


@EVERY_FAMILY
def test_an_unknown_field_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} .*logit_softcap = 30.0"):
        read_config(name, logit_softcap=30.0)


@EVERY_FAMILY
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"shared_expert_intermediate_size": 8},
        {"partial_rotary_factor": 0.5},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_that_changes_the_computation_is_refused_by_name(name, changes):
    (field,) = changes
    if name == "phi3" and field == "partial_rotary_factor":
        changes = {field: 0.6}  # not an even number of dimensions
    if name in OF_LAYER_TYPES and field == "layer_types":
        changes = {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}
    # of a rope dict the message names the type, which is what is not implemented
    with pytest.raises(ValueError, match="dynamic" if field == "rope_scaling" else field):
        read_config(name, **changes)


@EVERY_FAMILY
def test_fields_that_change_nothing_are_accepted(name):
    plain = read_config(name)
    harmless = {
        **{"attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True, "_name": "x"},
        **{"use_sliding_window": False, "hidden_act": ACTIVATIONS.get(name, "silu")},
        **({} if name in OF_LAYER_TYPES else {"layer_types": ["full_attention"] * 3}),
        **{"torch_dtype": "bfloat16", "eos_token_id": [1, 2], "initializer_range": 0.02},
        **{"quantization_config": None, "logit_softcap": None, "transformers_version": "4.40.0"},
    }
    assert read_config(name, **harmless) == plain


@EVERY_FAMILY
def test_a_boolean_of_transformers_is_implemented_or_refused_or_changes_no_logits(name):
    """Each boolean of the family's config class and of what every class has, and each field that
    the family's code asks for by getattr, as it was not: computed by transformers both ways.
    """
    plain = {key: value for key, value in ODD_CONFIG.items() if key != "model_type"}
    plain |= {"pad_token_id": None, "num_hidden_layers": 1} | EXPERTS.get(name, {})
    theirs = transformers.AutoConfig.for_model(name, **plain)
    kinds = {key: value for key, value in theirs.to_dict().items() if isinstance(value, bool)}
    modelling = type(transformers.AutoModelForCausalLM.from_config(theirs)).__module__
    source = inspect.getsource(sys.modules[modelling])
    source += inspect.getsource(transformers.masking_utils)
    asked = re.findall(r'getattr\((?:self\.)?config, "(\w+)", (?:True|False|None)\)', source)
    # return_dict changes what a call returns, not the logits in it.
    flips = [(key, not value) for key, value in kinds.items() if key != "return_dict"]
    flips += [(key, value) for key in {*asked, "is_causal"} for value in (True, False)]
    assert ("is_causal", False) in flips and len(flips) > 8
    reference = None
    for key, value in flips:
        config = ODD_CONFIG | plain | {"model_type": name, "sliding_window": None}
        config["sliding_window"] = 64 if name in OF_LAYER_TYPES else None
        try:
            ours = models.read(config | {key: value})[1]
        except ValueError as error:
            assert key in str(error)
            continue
        if ours != models.read(config)[1]:
            continue  # implemented: it has a test of its logits
        reference = random_logits(name, plain) if reference is None else reference
        np.testing.assert_array_equal(random_logits(name, plain | {key: value}), reference, key)


def random_logits(name: str, config: dict) -> np.ndarray:
    torch.manual_seed(0)
    config = json.loads(json.dumps(config)) | {"initializer_range": 0.2}
    theirs = transformers.AutoConfig.for_model(name, **config)
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    with torch.no_grad():
        return model(torch.arange(2, 14)[None], return_dict=True).logits.numpy()


@EVERY_FAMILY
def test_a_field_passes_only_at_a_neutral_value_of_its_own(name):
    plain = read_config(name)
    for changes in (
        *({"is_causal": value} for value in (False, None, 0, "true", [])),
        *({"an_unknown_switch": value} for value in (False, True, 0, 0.0, "x")),
        {"attention_dropout": False},
        {"is_encoder_decoder": True},
        {"tie_encoder_decoder": 1},
        {"residual_dropout": 0.1},
        {"text_config": {"is_causal": False}},
        {"no_bias": False},
        {"per_layer_config": {"0": {"hidden_size": 3}}},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            read_config(name, **changes)
    # What configs on the hub have, and what README once refused.
    harmless = {"is_causal": True, "residual_dropout": 0.0, "resid_pdrop": 0, "text_config": None}
    harmless |= {
        "output_attentions": False,
        "use_cache": 3,
        "temperature": 0.6,
        "torchscript": False,
    }
    harmless |= {"is_decoder": False, "pruned_heads": {}, "an_unknown_value": None}
    assert read_config(name, **harmless) == plain


ODD_VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**40,
        -(2**70),
        10**400,
        0.0,
        1.5,
        math.inf,
        math.nan,
        1e300,
    ),
    *("", "x", "1", [], [1], ["full_attention"], [[]], [None], {}, {"a": 1}, {"rope_type": 3}),
    *([{"a": []}], {"full_attention": {}}, {"rope_type": "yarn", "factor": []}),
]


@EVERY_FAMILY
def test_whatever_a_field_holds_it_is_read_or_a_value_error(name):
    theirs = transformers.AutoConfig.for_model(name, **ODD_CONFIG | {"pad_token_id": None})
    fields = {*theirs.to_dict(), *ODD_CONFIG, *Rope.FIELDS, "sliding_window_pattern", "layer_types"}
    fields |= {"rope_local_base_freq", "is_causal", "num_local_experts", "partial_rotary_factor"}
    refused = 0
    for field in fields - {"model_type"}:
        for value in ODD_VALUES:
            try:
                read_config(name, **{field: value})
            except ValueError as error:
                refused += 1
                assert len(str(error)) < 700 and "\n" not in str(error)
    assert refused > 300


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rms_norm_eps", [math.inf, -math.inf, math.nan, 1e300, 0, -1e-6, 10**400, True, "1e-6"]),
        ("rope_theta", [0, -1e4, math.inf, math.nan, 1, 10**400, True, "1e4", [1e4]]),
        ("hidden_size", [0, -48, 2**50, 48.0, "48", True, [48]]),
        ("num_hidden_layers", [0, 10**9, 2**63, 3.0]),
        ("vocab_size", [0, 2**31, 2**50]),
        ("num_attention_heads", [2**31]),
        ("head_dim", [0, -2, 2**40]),
        ("max_position_embeddings", [0, -1, 2**31, 256.0]),
        ("initializer_range", [math.nan, math.inf, -0.1, 5.0, "0.02"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_out_of_its_range_is_refused_by_name(name, field, values):
    name_in_message = {"gemma3_text": {"rope_theta": "rope_theta"}}.get(name, {}).get(field, field)
    for value in values:
        with pytest.raises(ValueError, match=rf"config\.json: {name_in_message} = "):
            read_config(name, **{field: value})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma2", {"attn_logit_softcapping": math.inf}),
        ("gemma3_text", {"final_logit_softcapping": -1}),
        ("gemma3_text", {"rope_local_base_freq": 0}),
        ("gemma3_text", {"sliding_window_pattern": 0}),
        ("phi3", {"partial_rotary_factor": 0}),
        ("phi3", {"partial_rotary_factor": 1.5}),
        ("phi3", {"original_max_position_embeddings": 0}),
        ("mixtral", {"num_experts_per_tok": 9}),
        ("mixtral", {"num_local_experts": 2**40}),
        ("mixtral", {"router_aux_loss_coef": math.nan}),
        ("mixtral", {"router_jitter_noise": False}),
        ("qwen3_moe", {"decoder_sparse_step": True}),
        ("qwen3_moe", {"moe_intermediate_size": 2**50}),
        (
            "llama",
            {
                "hidden_size": 2**20,
                "head_dim": 64,
                "intermediate_size": 2**22,
                "num_hidden_layers": 2**12,
            },
        ),
    ],
    ids=str,
)
def test_a_number_of_some_families_out_of_its_range_is_refused(name, changes):
    words = "parameters" if len(changes) > 1 else next(iter(changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        read_config(name, **changes)


@EVERY_FAMILY
@pytest.mark.parametrize(
    "field", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
def test_a_missing_size_is_named(name, field):
    with pytest.raises(ValueError, match=field):
        read_config(name, **{field: None})


def test_an_unknown_model_type_names_the_known_ones(make_model):
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    for unknown in ("gpt2", "layers", None, "qwen2.x"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": unknown}))
        with pytest.raises(ValueError) as error:
            jax_sft.load(folder)
        assert str(unknown) in str(error.value)
        assert all(name in str(error.value) for name in models.families())


def test_a_gemma3_that_takes_images_is_refused_with_the_family_of_its_language_model():
    with pytest.raises(ValueError, match="'gemma3' is not supported: .*text_config.*'gemma3_text'"):
        models.find("gemma3")


@EVERY_FAMILY
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "48"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 13},
        {"num_hidden_layers": 2.5},
        {"tie_word_embeddings": "false"},
        {"rope_theta": "1e4"},
        {"rope_scaling": [1]},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"layer_types": 3},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_a_value_error(name, changes):
    with warnings.catch_warnings():  # a NumPy warning is no message either
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"config\.json"):
            read_config(name, **changes)


@pytest.mark.parametrize("name", sorted(set(models.families()) - {"llama"}))
def test_a_bias_that_the_family_has_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match="mlp_bias = True"):
        read_config(name, mlp_bias=True)
    if name in ("qwen2", "mistral", "mixtral", "phi3"):
        with pytest.raises(ValueError, match="attention_bias = True"):
            read_config(name, attention_bias=True)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_a_sliding_window_that_the_family_has_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match="sliding_window = 64"):
        read_config(name, sliding_window=64)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_sliding_window_that_is_not_used_changes_nothing(name):
    unused = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
    assert read_config(name, **unused) == read_config(name)
    with pytest.raises(ValueError, match="use_sliding_window = True"):
        read_config(name, **unused | {"use_sliding_window": True})


FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3


def test_the_window_of_a_mistral_is_that_of_transformers():
    for given in ({}, {"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 4096}):
        theirs = transformers.AutoConfig.for_model("mistral", **ODD_CONFIG, **given)
        config = ODD_CONFIG | {"model_type": "mistral"} | given
        assert models.find("mistral").Config.from_hf(config).window == theirs.sliding_window
    assert read_config("mistral", sliding_window=7, layer_types=SLIDING).window == 7
    assert read_config("mistral", sliding_window=None, layer_types=FULL).window is None


@pytest.mark.parametrize("window", [0, -1, True, False, "7", 7.0, [7], {}], ids=str)
def test_a_sliding_window_that_is_no_positive_integer_is_refused(window):
    with pytest.raises(ValueError, match=r"config\.json: sliding_window"):
        read_config("mistral", sliding_window=window)


@pytest.mark.parametrize(
    ("window", "layer_types"),
    [
        (7, FULL),
        (None, SLIDING),
        (7, [*SLIDING[:2], *FULL[:1]]),
        (7, "sliding_attention"),
        (7, [3]),
    ],
)
def test_layer_types_that_contradict_the_sliding_window_are_refused(window, layer_types):
    with pytest.raises(ValueError, match=f"layer_types.* sliding_window = {window}"):
        read_config("mistral", sliding_window=window, layer_types=layer_types)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": FULL[:2]}, "layer_types has 2 entries for num_hidden_layers = 3"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping = 0 must be a number from"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=lambda changes: next(iter(changes)) if isinstance(changes, dict) else "",
)
@pytest.mark.parametrize("name", sorted(OF_LAYER_TYPES))
def test_a_gemma_that_is_not_implemented_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words):
        read_config(name, **changes)


@pytest.mark.parametrize("name", sorted(OF_LAYER_TYPES))
def test_the_defaults_of_a_gemma_are_those_of_transformers(name):
    config = {key: ODD_CONFIG[key] for key in ODD_CONFIG if not key.startswith("r")}
    config |= {"num_hidden_layers": 13}
    theirs = transformers.AutoConfig.for_model(name, **config)
    ours = models.find(name).Config.from_hf(config | {"model_type": name})
    kinds = [("full_attention", "sliding_attention")[windowed] for windowed in ours.windowed]
    assert kinds == theirs.layer_types and ours.window == theirs.sliding_window
    assert ours.query_scale == theirs.query_pre_attn_scalar**-0.5
    assert (ours.norm_eps, ours.head_dim) == (theirs.rms_norm_eps, theirs.head_dim)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.logit_soft_cap == (theirs.final_logit_softcapping or 0.0)
    assert ours.attention_soft_cap == (theirs.attn_logit_softcapping or 0.0)
    if name == "gemma3_text":
        ropes = {"full_attention": ours.rope, "sliding_attention": ours.window_rope}
        for kind, rope in ropes.items():
            theta = theirs.rope_parameters[kind]["rope_theta"]
            assert rope.inv_freq[1] == pytest.approx(theta ** (-2 / ours.head_dim))


@EVERY_FAMILY
def test_rope_scaling_beside_other_rope_parameters_is_not_ignored(name):
    # transformers lets rope_scaling win; refusing is as good, ignoring it is not.
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rope_scaling": YARN}
    try:
        rope = read_config(name, **both).rope
    except ValueError:
        return
    assert rope.attention_factor != 1.0
