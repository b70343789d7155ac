"""Adapters: the same training as peft and torch, PEFT's files in and out, frozen weights frozen."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jax_sft
from jax_sft import parallel
from tests.test_parity import (
    OPTIMIZER,
    packed_batches,
    their_learning_rate,
    their_loss,
)

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAMILIES = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 20},
    "olmo2": {"model_type": "olmo2", "head_dim": 20},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tensors this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def their_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def make_adapter(model: Path, out: Path, **options) -> Path:
    """An adapter folder that PEFT saves, all of its parts random."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ALL} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(their_model(model), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    adapted.save_pretrained(out)
    return out


def peft_logits(model: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    adapted = peft.PeftModel.from_pretrained(their_model(model), adapter)
    with torch.no_grad():
        return adapted(torch.tensor(tokens)).logits.numpy()


TOKENS = np.random.default_rng(1).integers(0, 272, (2, 40))


# ---- what an adapter computes --------------------------------------------------------------------

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_some": {"use_dora": True, "target_modules": ["o_proj", "down_proj", "k_proj"]},
    "regex": {"target_modules": r".*\.[02]\.(self_attn\.(q|o)_proj|mlp\.down_proj)"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_an_adapter_of_peft_equal_its_own(make_strong_model, tmp_path, variant):
    folder = make_strong_model(**FAMILIES["llama" if "dora" in variant else "qwen2"])
    adapter = make_adapter(folder, tmp_path / "adapter", **VARIANTS[variant])
    theirs = peft_logits(folder, adapter, TOKENS)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    ours = np.asarray(jax_sft.load(folder, mesh, adapter=adapter).logits(TOKENS))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - np.asarray(jax_sft.load(folder).logits(TOKENS))).max() > 0.3


# ---- training ------------------------------------------------------------------------------------


def their_training(cfg, adapter: Path, batches) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (losses, {name: final tensor of the adapter}) of peft and torch."""
    model = peft.PeftModel.from_pretrained(
        their_model(Path(cfg.model.path)), adapter, is_trainable=True
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    options = cfg.optimizer
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(options.b1, options.b2),
        eps=options.eps,
    )
    losses = []
    for step, rows in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = their_learning_rate(options, step)
        adamw.zero_grad()
        loss = their_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), options.clip_norm)
        losses.append(float(loss.detach()))
        adamw.step()
    found = {name.replace(".default", ""): p.detach().numpy() for name, p in trained.items()}
    return np.array(losses), {n.replace("_vector.weight", "_vector"): a for n, a in found.items()}


@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "dora"), ("qwen3", "lora"), ("olmo2", "regex")]
)
def test_twenty_steps_equal_peft_and_torch(
    make_strong_model, make_config, tmp_path, family, variant
):
    folder = make_strong_model(**FAMILIES[family])
    adapter = make_adapter(folder, tmp_path / "adapter", **VARIANTS[variant])
    cfg = make_config(
        folder,
        **OPTIMIZER | {"optimizer.learning_rate": 5e-3, "lora.path": str(adapter)},
        **{"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2, "train.export": True},
    )
    jax_sft.train(cfg, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [found["loss"] for found in map(json.loads, lines) if "loss" in found]
    their_losses, theirs = their_training(cfg, adapter, packed_batches(cfg))
    np.testing.assert_allclose(losses, their_losses, rtol=1e-4)
    assert their_losses[-1] < 0.8 * their_losses[0]
    before = load_file(adapter / "adapter_model.safetensors")
    ours = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for name in theirs:
        size = np.linalg.norm(theirs[name])
        assert np.linalg.norm(theirs[name] - before[name]) > 0.01 * size, name
        assert np.linalg.norm(ours[name] - theirs[name]) < 1e-4 * size, name
    assert_same_logits(folder, tmp_path)


def assert_same_logits(model: Path, tmp_path: Path) -> None:
    """What a run exported computes the same unmerged and merged, here and in transformers."""
    adapter, merged = tmp_path / "run" / "export", tmp_path / "merged"
    jax_sft.export(tmp_path / "run" / "checkpoints", merged, merge=True, progress=False)
    ours = jax_sft.load(model, adapter=adapter).logits(TOKENS)
    assert np.abs(ours - jax_sft.load(model).logits(TOKENS)).max() > 0.3
    np.testing.assert_allclose(peft_logits(model, adapter, TOKENS), ours, rtol=0, atol=1e-4)
    with torch.no_grad():
        theirs = their_model(merged)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
