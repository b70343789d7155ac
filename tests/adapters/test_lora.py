"""Adapters: the same training as peft and torch, PEFT's files in and out, frozen weights frozen."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.numpy import load_file, save_file

import jax_sft
from jax_sft import tiny
from jax_sft.adapters import lora
from jax_sft.adapters import peft as ours
from jax_sft.files import step_folders
from jax_sft.inference import LoadedModel
from jax_sft.runtime import patterns
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import metrics
from jax_sft.training.step import batch_sums
from tests import sharing, tiers
from tests.inputs import ODD
from tests.models.test_parity import (
    OPTIMIZER,
    packed_batches,
    their_learning_rate,
    their_loss,
    their_model,
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


def make_adapter(model: Path, out: Path, **options) -> Path:
    """An adapter folder that PEFT saves, all of its parts random."""
    options = {"r": 4, "lora_alpha": 5, "target_modules": ALL} | options
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
    "dora_rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {".*": 2}},
    "dora_some": {"use_dora": True, "target_modules": ["o_proj", "down_proj", "k_proj"]},
    "regex": {
        "target_modules": r"(?!.*layers\.1).*(q|o|down)_proj",
        "exclude_modules": ["2.mlp.down_proj"],
        "rank_pattern": {"[a-z]+_proj": 2},
        "alpha_pattern": {".*": 7},
    },
}


@pytest.mark.parametrize("variant", tiers.fast(["dora_rslora", "regex"], VARIANTS))
def test_logits_with_an_adapter_of_peft_equal_its_own(make_strong_model, tmp_path, variant):
    folder = make_strong_model(**FAMILIES["llama" if "dora" in variant else "qwen2"])
    adapter = make_adapter(folder, tmp_path / "adapter", **VARIANTS[variant])
    theirs = peft_logits(folder, adapter, TOKENS)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
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
        loss, _ = their_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), options.clip_norm)
        losses.append(float(loss.detach()))
        adamw.step()
    found = {name.replace(".default", ""): p.detach().numpy() for name, p in trained.items()}
    return np.array(losses), {n.replace("_vector.weight", "_vector"): a for n, a in found.items()}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "dora"),
        pytest.param("qwen3", "lora", marks=pytest.mark.slow),
        pytest.param("olmo2", "regex", marks=pytest.mark.slow),
    ],
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


def losses_of(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


def test_new_adapters_change_nothing_before_they_are_trained(make_strong_model):
    plain = jax_sft.load(make_strong_model(**FAMILIES["qwen3"]))
    settings = lora.AdapterSettings(rank=4, alpha=8.0)
    model_def = lora.add(plain.model_def, settings)
    new = lora.init(model_def, settings, plain.params, plain.mesh, 3, np.float32)
    model = LoadedModel(model_def, plain.params | new, plain.mesh)
    np.testing.assert_array_equal(model.logits(TOKENS), plain.logits(TOKENS))
    a = np.asarray(new["layers.mlp.down.lora.a.kernel"])
    assert np.abs(a).max() <= 80**-0.5 < 1.01 * np.abs(a).max()  # uniform within 1 / sqrt(inputs)
    assert abs(a.mean()) < 0.1 * a.std()
    assert len({float(layer.sum()) for layer in a}) == 3  # layers differ


def test_a_stopped_run_goes_on_bitwise_and_stores_adapters_alone(
    make_strong_model, make_config, tmp_path
):
    folder = make_strong_model(**FAMILIES["qwen2"], num_hidden_layers=2, vocab_size=269)
    cfg = make_config(
        folder,
        **{"lora.rank": 4, "lora.dropout": 0.1, "lora.targets": ("q_proj", "down_proj")},
        **{"train.steps": 6, "checkpoint.every_steps": 2, "batch.micro_rows": 4},
        **{"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.cpu_devices": 8, "mesh.data": 2},
    )
    halted = tmp_path / "halted"
    real = metrics.Meter.add

    def stop_after_five(meter, sums, *args):
        real(meter, sums, *args)
        stop_after_five.count += 1
        if stop_after_five.count == 5:
            raise KeyboardInterrupt

    stop_after_five.count = 0
    with sharing.one_program():
        jax_sft.train(cfg, tmp_path / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics.Meter, "add", stop_after_five)
            with pytest.raises(KeyboardInterrupt):
                jax_sft.train(cfg, halted)
        jax_sft.train(cfg, halted)
    assert losses_of(halted)[-2:] == losses_of(tmp_path / "whole")[-2:]
    arrays = step_folders.params(halted / "checkpoints", 6)
    assert len(arrays) == 4 and all(".lora." in path for path in arrays)
    # The folder of the model is needed as it was.
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    cfg.mesh.tensor, cfg.mesh.sequence = 1, 2  # the vocabulary is padded no more: no difference
    with pytest.raises(ValueError, match="has: layers.mlp.up.kernel differ"):
        jax_sft.train(cfg, halted)
    with pytest.raises(ValueError, match=r"layers.mlp.up.kernel is frozen, but.*--base"):
        jax_sft.export(halted / "checkpoints", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    jax_sft.export(halted / "checkpoints", tmp_path / "adapter")  # needs no weights of the model


def test_dropout_drops_the_share_it_should_the_same_on_every_mesh(make_strong_model):
    settings = lora.AdapterSettings(4, 8.0, dropout=0.25, targets=("o_proj", "down_proj"))
    plain = jax_sft.load(make_strong_model(**FAMILIES["qwen2"]))
    model_def = lora.add(plain.model_def, settings)
    new = lora.init(model_def, settings, plain.params, plain.mesh, 0, np.float32)
    weights = {path: np.asarray(array) for path, array in (plain.params | new).items()}
    for path in new:
        if path.endswith("b.kernel"):
            weights[path] = np.full_like(weights[path], 0.05)
    batch = {
        "tokens": np.resize(TOKENS, (2, 64)),
        "segment_ids": np.ones((2, 64), np.int32),
        "positions": np.tile(np.arange(64), (2, 1)),
        "targets": np.resize(TOKENS, (2, 64)),
        "weights": np.ones((2, 64), np.float32),
    }

    sums = jax.jit(lambda w, b, k: batch_sums(model_def, w, b, dropout_key=k))

    def loss(sizes, key) -> float:
        mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            return float(sums(weights, batch, key)["loss"])

    one, two = jax.random.key(1), jax.random.key(2)
    assert loss({}, one) == loss({}, one) != loss({}, two)
    assert loss({}, None) not in (loss({}, one), loss({}, two))
    spread = {"fsdp": 2, "tensor": 2, "sequence": 2}
    assert loss(spread, one) == pytest.approx(loss({}, one), rel=1e-6)
    module = model_def.bind(weights, one).layers.mlp.down.lora
    with jax.set_mesh(plain.mesh):
        dropped = np.asarray(jax.vmap(type(module)._drop)(module, np.ones((3, 2, 50, 80))))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.targets": ("q_proj", "qkv_proj")}, ["qkv_proj", "model.layers.0.self_attn.q_proj"]),
        ({"lora.targets": ("lm_head",)}, ["lm_head", "matches no linear layer"]),
        ({"lora.targets": ("q_(proj",)}, ["lora.targets", "q_(proj", "regular expression"]),
        ({"lora.targets": ()}, ["lora.targets"]),
        ({"lora.rank": -1}, ["lora.rank = -1"]),
        ({"lora.dropout": 1.0}, ["lora.dropout = 1.0"]),
        ({"lora.alpha": 0.0}, ["lora.alpha = 0.0"]),
        ({"train.freeze": ("embed",)}, ["train.freeze does not go with lora"]),
        ({"lora.rank": 0, "train.freeze": ("embd",)}, ["embd", "model.embed_tokens.weight"]),
        ({"lora.rank": 0, "train.freeze": ("",)}, ["every tensor"]),
        ({"lora.rank": 0, "train.freeze": ("[",)}, ["train.freeze", "regular expression"]),
        ({"lora.rank": 0, "train.freeze": ("(.+)+Z",)}, ["train.freeze: '(.+)+Z' takes over"]),
        ({"lora.targets": ("(.+)+Z",)}, ["lora.targets: '(.+)+Z' takes over"]),
        ({"lora.rank": 0, "lora.targets": ("q_proj",)}, ["lora.targets = ('q_proj',) needs adapt"]),
        ({"lora.rank": 0, "lora.alpha": 8.0}, ["lora.alpha = 8.0 needs adapters: set lora.rank"]),
        ({"lora.rank": 0, "lora.dropout": 0.1}, ["lora.dropout = 0.1 needs adapters"]),
        (
            {"lora.rank": 0, "lora.rslora": True, "lora.dora": True, "lora.quantize": "nf4"},
            ["lora.rslora = True and lora.dora = True and lora.quantize = 'nf4' need adapters"],
        ),
        ({"lora.path": "nowhere"}, ["nowhere has no adapter_config.json"]),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_refused_before_the_data_are_read(
    make_config, tmp_path, changes, words, monkeypatch
):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    cfg = make_config(**{"lora.rank": 4} | changes)
    Path(cfg.data.train.main.path).write_text("{")  # would be the next error
    with pytest.raises(ValueError) as error:
        jax_sft.train(cfg, tmp_path / "run")
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture(scope="module")
def refused_folder(tmp_path_factory):
    """A model and an adapter of all its linear layers."""
    folder = tmp_path_factory.mktemp("refused")
    tiny.write_tokenizer(folder)
    tiny.write_model(folder, ODD | FAMILIES["qwen2"])
    return folder, make_adapter(folder, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "with layers_to_transform does not choose it"),
        ({"layers_to_transform": 0}, "with layers_to_transform does not choose it"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules does not choose it"),
        ({"exclude_modules": "(.+)+Z"}, "exclude_modules: '(.+)+Z' takes over"),
        ({"rank_pattern": {"o_proj": 8}, "alpha_pattern": {"o_proj": 10}}, "rank_pattern = {'o_"),
        ({"rank_pattern": {"(.+)+Z": 4}}, "rank_pattern: '(.*\\\\.)?((.+)+Z)$' takes over"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 7}}, "alpha_pattern"),
        ({"target_modules": r".*\.q_proj"}, "target_modules does not choose it"),
        ({"target_modules": "q_proj"}, "target_modules does not choose it"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"field_of_a_later_peft": 1}, "field_of_a_later_peft"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"r": 5}, "lora_A.weight has shape (4, 48), not (5, 48)"),
        ({"r": "4"}, "r = '4'"),
        ({"target_modules": ["q_proj"]}, "belongs to no adapter"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
    ids=str,
)
def test_an_adapter_that_is_not_understood_is_refused_by_name(
    refused_folder, tmp_path, changes, word, monkeypatch
):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    folder, made = refused_folder
    adapter = tmp_path / "adapter"
    shutil.copytree(made, adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError) as error:
        jax_sft.load(folder, adapter=adapter)
    assert word in str(error.value)


def test_a_link_out_of_an_adapter_is_refused(make_strong_model, tmp_path):
    folder = make_strong_model(**FAMILIES["qwen2"])
    adapter = make_adapter(folder, tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    file = adapter / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere" / file.name)
    file.symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(ValueError, match=r"links out of the folder: adapter_model.safetensors"):
        jax_sft.load(folder, adapter=adapter)


def test_settings_that_contradict_the_adapter_they_go_on_from_are_refused(
    make_strong_model, make_config, tmp_path
):
    folder = make_strong_model(**FAMILIES["qwen2"])
    adapter = make_adapter(folder, tmp_path / "adapter")
    for changes in ({"lora.rank": 3}, {"lora.alpha": 8.0}, {"lora.targets": ("q_proj",)}):
        cfg = make_config(folder, **{"lora.path": str(adapter)} | changes)
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}.*leave it at its default"):
            jax_sft.train(cfg, tmp_path / "run")


# ---- frozen weights ------------------------------------------------------------------------------


def test_frozen_tensors_stay_and_the_others_train_as_in_torch(
    make_strong_model, make_config, tmp_path
):
    # Tied: the head is frozen too. And padded, in training but not in what is exported.
    folder = make_strong_model(**FAMILIES["qwen2"] | {"vocab_size": 269})
    patterns = ("embed_tokens", r"layers\.[02]\.", "k_proj.bias$")
    cfg = make_config(
        folder,
        **OPTIMIZER | {"train.freeze": patterns, "train.steps": 8, "train.export": True},
        **{"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2, "checkpoint.every_steps": 5},
    )
    jax_sft.train(cfg, tmp_path / "run")
    model = their_model(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(re.search(one, name) for one in patterns)
    moving = [p for p in model.parameters() if p.requires_grad]
    options = cfg.optimizer
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in moving if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(options.b1, options.b2),
        eps=options.eps,
    )
    losses = []
    for step, rows in enumerate(packed_batches(cfg, 8)):
        for group in adamw.param_groups:
            group["lr"] = their_learning_rate(options, step, 8)
        adamw.zero_grad()
        loss, _ = their_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, options.clip_norm)
        losses.append(float(loss.detach()))
        adamw.step()
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses, rtol=1e-4)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            theirs = parameter.detach().numpy()
            moved = np.linalg.norm(theirs - before[name])
            # Not even equal bits are wrong; what did not move at all is.
            assert np.linalg.norm(after[name] - theirs) < 1e-3 * moved, name
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # What is wholly frozen is not stored; the run goes on from what is.
    stored = step_folders.params(tmp_path / "run" / "checkpoints", 8)
    assert "embed.table" not in stored and "layers.attn.k.bias" not in stored
    assert "layers.attn.q.kernel" in stored
    with pytest.raises(ValueError, match="no adapters"):
        jax_sft.export(tmp_path / "run" / "checkpoints", tmp_path / "merged", merge=True)


# ---- tensors that hold several kernels -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_of_kernels_that_share_a_tensor(make_strong_model, make_config, tmp_path, dora):
    folder = make_strong_model(model_type="phi3", pad_token_id=None, tie_word_embeddings=False)
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    options = {"target_modules": fused, "use_dora": dora, "use_rslora": not dora}
    adapter = make_adapter(folder, tmp_path / "adapter", **options)
    theirs = peft_logits(folder, adapter, TOKENS)
    ours = jax_sft.load(folder, adapter=adapter).logits(TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # From PEFT's one A for all of a tensor each kernel gets its own.
    cfg = make_config(
        folder,
        **{"lora.path": str(adapter), "train.steps": 3, "optimizer.learning_rate": 5e-3},
        **{"train.export": True, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2},
    )
    jax_sft.train(cfg, tmp_path / "run")
    assert_same_logits(folder, tmp_path)
    stored = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.self_attn.qkv_proj."
    assert stored[layer + "lora_A.weight"].shape == (12, 48)
    b = stored[layer + "lora_B.weight"]
    assert b.shape == (96, 12) and b[:48, :4].all() and not b[:48, 4:].any()
    # An adapter whose B has something outside its diagonal cannot be taken apart.
    stored[layer + "lora_B.weight"][0, 11] = 1.0
    file = tmp_path / "run" / "export" / "adapter_model.safetensors"
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="outside its diagonal"):
        jax_sft.load(folder, adapter=file.parent)


# ---- PEFT's rules --------------------------------------------------------------------------------

NAMES = [
    *(f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1, 2, 10, 11) for part in "qkvo"),
    *(f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1, 2, 10, 11) for part in ("up", "down")),
]
SELECTIONS = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["proj", "q", "j"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": r"(?!.*layers\.0).*q_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": r"(?i)MODEL\.LAYERS\.1.*"},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\d?\..*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.self_attn.q_proj", "mlp"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    {
        "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"],
        "layers_to_transform": [0],
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_the_layers_of_an_adapter_are_those_that_peft_chooses(selection):
    config = peft.LoraConfig(**selection)
    theirs = [bool(check_target_module_exists(config, n)) for n in NAMES]
    theirs = [
        yes and not isinstance(check_target_module_exists(config, n), _ExcludedModule)
        for n, yes in zip(NAMES, theirs, strict=True)
    ]
    saved = config.to_dict()
    saved = {k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()}
    assert ours.chosen(saved, NAMES, "adapter_config.json") == theirs


def test_every_field_of_peft_is_read_ignored_or_refused_by_name(tmp_path):
    fields = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    plain = fields | {"peft_type": "LORA", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    known = {*ours._IGNORED, *ours._SELECTION, "r", "lora_alpha", "lora_dropout", "use_dora"}
    known |= {"use_rslora", "rank_pattern", "alpha_pattern"}
    for name in sorted(fields.keys() - known):
        (tmp_path / "adapter_config.json").write_text(json.dumps(plain | {name: "strange"}))
        with pytest.raises(ValueError, match=rf"adapter_config.json: {name} = 'strange'"):
            ours.read_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain, default=str))
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle file.*never read"):
        ours.read_settings(tmp_path)
