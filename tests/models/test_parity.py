"""The same training in torch: losses, gradients and final weights equal an independent loop.

The loop below shares with the package only the packed rows. Its model is transformers', its mask is
a matrix, its optimizer and clipping are torch's, its schedule is written from the docstring of
`optim.learning_rate` in float64.
"""

import json
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import jax_sft
from jax_sft import config, models
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens.prepare import prepare
from jax_sft.nn.model_def import ModelDef
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.training import optim, state
from jax_sft.training.program import objective
from jax_sft.training.step import Scalars, make_train_step, value_and_grad
from jax_sft.weights import hf_folder, hf_reader, placement
from tests import tiers

NUM_STEPS = 20
FAMILIES = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 20},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": True},
    # Shorter than most examples.
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 9},
    "gemma2": {
        **{"model_type": "gemma2", "head_dim": 12, "sliding_window": 9, "pad_token_id": None},
        **{"query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0},
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        **{"model_type": "gemma3_text", "head_dim": 20, "sliding_window": 9, "pad_token_id": None},
        **{"query_pre_attn_scalar": 7, "sliding_window_pattern": 2, "rope_local_base_freq": 70.0},
    },
    "phi3": {
        **{"model_type": "phi3", "tie_word_embeddings": False, "pad_token_id": None},
        **{"sliding_window": 9, "partial_rotary_factor": 0.5},
    },
    # The weight of the balance is large enough that a wrong one would show.
    "mixtral": {
        **{"model_type": "mixtral", "tie_word_embeddings": True, "sliding_window": 9},
        **{"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3},
    },
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "tie_word_embeddings": False, "num_experts": 6},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 28, "router_aux_loss_coef": 0.3},
    },
}
BIASES = {  # beside those that a family has anyway
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "gemma3_text": {"attention_bias": True},
    "qwen3_moe": {"attention_bias": True},
}
# Of the newer families: each axis is in use in one of the two.
GRADIENT_MESH = {"fsdp": 2, "tensor": 2, "sequence": 2}
STEPS_MESH = {"data": 2, "fsdp": 2, "tensor": 2}
CLIP_NORM = 4.0  # between the gradient norms of the first and of the last steps
# Far from the defaults where these would hide a mistake: eps and weight decay too small to see.
OPTIMIZER = {
    **{"optimizer.learning_rate": 1.2e-3, "optimizer.warmup": 3, "optimizer.final_ratio": 0.2},
    **{"optimizer.weight_decay": 0.5, "optimizer.b1": 0.8, "optimizer.b2": 0.9},
    **{"optimizer.eps": 1e-5, "optimizer.clip_norm": CLIP_NORM, "optimizer.decay_fraction": 0.4},
    **{"train.steps": NUM_STEPS},
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tensors this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the independent loop ------------------------------------------------------------------------


def their_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def their_loss(model, rows: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over weighted targets of packed rows, arrays [B, T]; and what else is
    trained: the balance of experts, or 0.
    """
    tokens, targets, segments, positions = (
        torch.tensor(rows[name], dtype=torch.long)
        for name in ("tokens", "targets", "segment_ids", "positions")
    )
    weights = torch.tensor(rows["weights"])
    order = torch.arange(tokens.shape[1])
    seen = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :])
    near, window = seen, getattr(model.config, "sliding_window", None)
    if window:
        near = seen & (order[:, None] - window < order[None, :])
    full, sliding = (
        torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
        for sees in (seen, near)
    )
    of_each_kind = {"full_attention": full, "sliding_attention": sliding}
    coefficient, balance = getattr(model, "router_aux_loss_coef", 0.0), torch.tensor(0.0)
    has_kinds = hasattr(model.config, "layer_types") and not coefficient
    options = {"attention_mask": of_each_kind if has_kinds else sliding, "position_ids": positions}
    if coefficient:  # not of the whole model: its balance would take the mask for one of tokens
        found = model.model(tokens, **options, output_router_logits=True)
        logits, experts = model.lm_head(found.last_hidden_state), model.num_experts
        balance = load_balancing_loss_func(
            found.router_logits, experts, model.num_experts_per_tok, segments > 0
        )
    else:
        logits = model(tokens, **options).logits
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
    )
    loss = (losses * weights.reshape(-1)).sum() / weights.sum()
    return loss, coefficient * balance


def their_learning_rate(optimizer, step: int, num_steps: int = NUM_STEPS) -> float:
    """The rate of a step, 0 = first; `optimizer.warmup` is a number of steps here."""
    warmup, floor = int(optimizer.warmup), optimizer.final_ratio
    if step < warmup:
        factor = (step + 1) / (warmup + 1)
    elif optimizer.schedule == "cosine":
        angle = math.pi * (step - warmup) / (num_steps - warmup)
        factor = floor + (1 - floor) * (1 + math.cos(angle)) / 2
    elif optimizer.schedule == "linear":
        factor = 1 + (floor - 1) * (step - warmup) / (num_steps - warmup)
    elif optimizer.schedule == "wsd":
        decay_steps = optimizer.decay_fraction * num_steps
        into_decay = max(step - (num_steps - decay_steps), 0)
        factor = 1 + (floor - 1) * into_decay / decay_steps
    else:
        assert optimizer.schedule == "constant"
        factor = 1.0
    return optimizer.learning_rate * factor


def their_training(cfg, batches: list[dict[str, np.ndarray]]):
    """Return (losses, gradient norms, {name: final weight})."""
    model = their_model(Path(cfg.model.path))
    parameters = list(model.parameters())
    options = cfg.optimizer
    adamw = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(options.b1, options.b2),
        eps=options.eps,
    )
    losses, norms = [], []
    for step, rows in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = their_learning_rate(options, step)
        adamw.zero_grad()
        loss, balance = their_loss(model, rows)
        (loss + balance).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)))
        losses.append(float(loss.detach()))
        adamw.step()
    return np.array(losses), np.array(norms), saved(model)


def saved(model) -> dict[str, np.ndarray]:
    """The tensors of a model as transformers writes them, one for each expert."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


# ---- ours ----------------------------------------------------------------------------------------


def make_loader(cfg, mesh, micro_rows: int = 0) -> Loader:
    data = config.to_settings(cfg).data
    examples = prepare(data.train, Path(cfg.model.path), data, progress=False)
    return Loader(
        examples,
        data,
        data.train,
        rows=cfg.batch.rows,
        micro_rows=micro_rows or cfg.batch.rows,
        mesh=mesh,
        shuffle=cfg.data.shuffle,
        seed=cfg.seed,
    )


def packed_batches(cfg, num_steps: int = NUM_STEPS) -> list[dict[str, np.ndarray]]:
    """The rows of each step, arrays [rows, seq_len]."""
    loader = make_loader(cfg, single_device_mesh())
    batches = []
    for step in range(num_steps):
        rows = [loader.row(step, row) for row in range(cfg.batch.rows)]
        batches.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return batches


def load(cfg, sizes: dict[str, int]):
    """Return (model_def, params, mesh)."""
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    folder = Path(cfg.model.path)
    config = hf_folder.read_json(folder / "config.json")
    family = models.find(config["model_type"])
    # Without remat, which compiles faster; the run on eight devices has the default's.
    model_def = ModelDef.of(family, family.Config.from_hf(config), dtype="float32")
    rows, dims = model_def.specs, model_def.cfg.axis_sizes
    tensors = hf_reader.check(folder, rows, dims, model_def.cfg.tied)
    shardings = placement.shardings(rows, mesh)
    return (
        model_def,
        hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False),
        mesh,
    )


def our_training(cfg, sizes: dict[str, int], micro_rows: int = 0, num_steps: int = NUM_STEPS):
    """Return (losses, gradient norms, learning rates, {name: final weight}) of steps by hand."""
    model_def, params, mesh = load(cfg, sizes)
    tx = optim.make(cfg.optimizer.moments_dtype, model_def.specs)
    current = state.create(tx, params, model_def.specs, mesh)
    shardings = state.shardings(tx, params, model_def.specs, mesh)
    trained = objective(config.to_settings(cfg).loss, model_def.cfg)
    numbers = optim.hyperparams(cfg.optimizer, NUM_STEPS)
    scalars = Scalars(numbers, np.float32(trained["router_aux"])).on(mesh)
    step = make_train_step(model_def, tx, shardings, mesh, objective=trained)
    found = []
    with jax.set_mesh(mesh):
        for batch in make_loader(cfg, mesh, micro_rows).batches(0, num_steps):
            current, sums = step(current, batch, scalars)
            found.append((sums["loss"] / sums["weight"], sums["grad_norm"], sums["learning_rate"]))
    assert int(current.step) == num_steps
    return *np.array(found).T, to_hf(model_def, current.params)


def to_hf(model_def: ModelDef, params) -> dict[str, np.ndarray]:
    host = {path: np.asarray(array) for path, array in params.items()}
    tensors: dict[str, list[np.ndarray]] = {}
    for row in model_def.specs:
        for index, name in row.hf_tensors(model_def.cfg.axis_sizes):
            part = row.to_hf(host[row.path][index], model_def.cfg.axis_sizes)
            tensors.setdefault(name, []).append(part)
    return {name: np.concatenate(parts) for name, parts in tensors.items()}


# ---- tests ---------------------------------------------------------------------------------------


def assert_same_training(cfg, losses, norms, rates, weights) -> None:
    """Compare with the independent loop: losses and norms of each step, and what was learned."""
    their_losses, their_norms, their_weights = their_training(cfg, packed_batches(cfg))
    assert (their_norms > CLIP_NORM).any() and (their_norms < CLIP_NORM).any()
    assert their_losses[-1] < 0.5 * their_losses[0]
    their_rates = [their_learning_rate(cfg.optimizer, step) for step in range(NUM_STEPS)]
    np.testing.assert_allclose(rates, their_rates, rtol=1e-6)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-4)
    np.testing.assert_allclose(norms, their_norms, rtol=1e-4)
    before = load_file(Path(cfg.model.path) / "model.safetensors")
    assert weights.keys() == their_weights.keys()
    for name, theirs in their_weights.items():
        moved = np.linalg.norm(theirs - before[name])
        assert moved > 0.005 * np.linalg.norm(before[name]), name
        assert np.linalg.norm(weights[name] - theirs) < 2e-4 * moved, name


def test_the_batches_exercise_packing_padding_and_masked_targets(make_config):
    batches = packed_batches(make_config())
    segments = np.stack([batch["segment_ids"] for batch in batches])
    weights = np.stack([batch["weights"] for batch in batches])
    assert segments.max() >= 2  # several examples in a row
    assert (segments == 0).all(axis=-1).any()  # an empty row, at the end of an epoch
    assert (weights[segments == 0] == 0).all()
    assert 0.05 < weights[segments > 0].mean() < 0.95


@pytest.mark.parametrize(
    ("family", "schedule", "sizes"),
    [
        tiers.full("qwen2", "cosine", {}),
        tiers.full("llama", "wsd", {}),
        tiers.full("llama", "linear", GRADIENT_MESH),
        # Their gradients are compared below; what a step makes of them is the same for all.
        *(
            pytest.param(family, "cosine", STEPS_MESH, marks=pytest.mark.slow)
            for family in ("qwen3", "olmo2", "qwen3_moe", "gemma2", "gemma3_text", "phi3")
        ),
        # With "cosine" its norms move too little for this test.
        pytest.param("mixtral", "constant", STEPS_MESH, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_equal_torch(make_strong_model, make_config, family, schedule, sizes):
    cfg = make_config(
        make_strong_model(**FAMILIES[family]), **OPTIMIZER, **{"optimizer.schedule": schedule}
    )
    assert_same_training(cfg, *our_training(cfg, sizes))


def test_a_whole_run_on_eight_devices_equals_torch(make_strong_model, make_config, tmp_path):
    cfg = make_config(
        make_strong_model(**FAMILIES["mistral"]),
        **OPTIMIZER,
        **{f"mesh.{axis}": size for axis, size in STEPS_MESH.items()},
        **{"optimizer.schedule": "cosine", "train.export": True},
    )
    jax_sft.train(cfg, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [metrics for metrics in map(json.loads, lines) if "loss" in metrics]
    assert [metrics["step"] for metrics in steps] == list(range(1, NUM_STEPS + 1))
    keys = ("loss", "grad_norm", "learning_rate")
    found = [np.array([metrics[key] for metrics in steps]) for key in keys]
    assert_same_training(cfg, *found, load_file(tmp_path / "run" / "export" / "model.safetensors"))


# Windows, soft caps, four norms; norms of q and k, experts. The logits of one model of each family
# are compared in the fast tier.
@pytest.mark.parametrize("family", tiers.fast(["gemma2", "qwen3_moe"], FAMILIES))
def test_the_gradient_of_every_tensor_equals_torch(make_strong_model, make_config, family):
    cfg = make_config(make_strong_model(**FAMILIES[family], **BIASES.get(family, {})))
    is_older = family in ("qwen2", "llama")
    model_def, params, mesh = load(cfg, {"fsdp": 2} if is_older else GRADIENT_MESH)
    with jax.set_mesh(mesh):
        batch = next(make_loader(cfg, mesh).batches(0, 1))
        trained = objective(config.to_settings(cfg).loss, model_def.cfg)
        step = jax.jit(lambda p, b: value_and_grad(model_def, p, b, objective=trained))
        sums, grads = step(params, batch)
    ours = to_hf(model_def, grads)

    model = their_model(Path(cfg.model.path))
    loss, balance = their_loss(model, packed_batches(cfg, 1)[0])
    (loss + balance).backward()
    mean = {name: float(sums.get(name, 0.0) / sums["weight"]) for name in ("loss", "router_loss")}
    assert mean["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    router_aux = trained["router_aux"]
    assert router_aux * mean["router_loss"] == pytest.approx(float(balance.detach()), rel=1e-5)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    theirs = saved(model)
    assert ours.keys() == theirs.keys()
    idle = {name for name, grad in theirs.items() if not grad.any()}
    assert bool(idle) == ("experts" in model_def.cfg.axis_sizes)  # inputs.uneven sees to it
    for name, grad in theirs.items():
        size = np.linalg.norm(grad)
        assert size > 1e-3 or (name in idle and ".experts." in name), name
        assert np.linalg.norm(ours[name] - grad) <= 1e-4 * size, name


def test_micro_batches_give_the_losses_of_one_batch(make_strong_model, make_config):
    # Micro-batches hold different numbers of trained tokens: a mean of means would differ.
    cfg = make_config(make_strong_model(**FAMILIES["qwen2"]), **OPTIMIZER)
    batches = packed_batches(cfg, 5)
    trained = [batch["weights"].reshape(4, 2, 128).sum((1, 2)) for batch in batches]
    assert max(counts.max() / max(counts.min(), 1) for counts in trained) > 1.2
    whole = their_training(cfg, batches)
    parts = our_training(cfg, {"fsdp": 2}, micro_rows=2, num_steps=5)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-5)


def test_experts_are_balanced_within_each_micro_batch(make_strong_model, make_config):
    cfg = make_config(make_strong_model(**FAMILIES["mixtral"]))
    model_def, params, mesh = load(cfg, {})
    with jax.set_mesh(mesh):
        batch = next(make_loader(cfg, mesh, micro_rows=2).batches(0, 1))
        trained = objective(config.to_settings(cfg).loss, model_def.cfg)
        step = jax.jit(lambda p, b: value_and_grad(model_def, p, b, objective=trained))
        sums, grads = step(params, batch)

    model = their_model(Path(cfg.model.path))
    whole = {name: np.asarray(array) for name, array in batch.items()}
    parts = [{name: array[n] for name, array in whole.items()} for n in range(4)]
    rows = {name: array.reshape(8, -1) for name, array in whole.items()}
    weights = [float(part["weights"].sum()) for part in parts]
    found = [their_loss(model, part) for part in parts if part["weights"].any()]
    weights = [weight for weight in weights if weight]
    mean = sum(w * (loss + balance) for w, (loss, balance) in zip(weights, found, strict=True))
    (mean / sum(weights)).backward()
    theirs = sum(w * balance.item() for w, (_, balance) in zip(weights, found, strict=True))
    ours = trained["router_aux"] * float(sums["router_loss"])
    assert ours == pytest.approx(theirs, rel=1e-5)
    of_all_rows = sum(weights) * their_loss(model, rows)[1].item()
    assert abs(ours - of_all_rows) > 1e-4 * of_all_rows
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    assert float(optax.tree.norm(grads)) == pytest.approx(norm, rel=1e-5)
