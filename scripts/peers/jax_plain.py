"""A training step as a good JAX programmer writes it in a page: jax.nn and optax, no framework.

Trains a Qwen2 or Llama model on packed rows, without importing jax_sft. A model folder without
weights gives random ones.

Shape suffixes: B rows, T tokens, D model, N heads, K kv heads, H head dim, V vocabulary.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open

from scripts.peers import contract

Params = dict[str, Any]  # {"embed", "head" unless tied, "norm", "layers": {name: all layers'}}
Batch = dict[str, jax.Array]  # tokens, targets, weights, segment_ids, positions, each [B, T]

# {our name: name in the files} of a layer's tensors.
MATRICES = {
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
NORMS = {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
BIASES = {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
# {field of config.json that changes the computation: its only implemented value}.
ONLY = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model; `implementation` is an argument of jax.nn.dot_product_attention."""

    features: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    theta: float
    tied: bool
    has_biases: bool
    dtype: str
    implementation: str

    @classmethod
    def of(cls, raw: dict[str, Any], dtype: str) -> "Config":
        """Read config.json.

        Raises:
            ValueError: another family, or a value that is not implemented.
        """
        if raw["model_type"] not in ("qwen2", "llama"):
            raise ValueError(f"model_type = {raw['model_type']!r}: use qwen2 or llama")
        for name, value in ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(f"config.json: {name} = {raw[name]!r} is not implemented")
        rope = raw.get("rope_parameters") or {}  # written by transformers 5
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"config.json: rope_parameters = {rope!r} is not implemented")
        heads = raw["num_attention_heads"]
        return cls(
            features=raw["hidden_size"],
            mlp=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocab=raw["vocab_size"],
            eps=raw.get("rms_norm_eps", 1e-6),
            theta=rope.get("rope_theta") or raw.get("rope_theta", 10_000.0),
            tied=raw.get("tie_word_embeddings", False),
            has_biases=raw["model_type"] == "qwen2",
            dtype=dtype,
            # cuDNN's flash attention gets packing as a bias of T x T. It isolates segments, but
            # skips only the work after a token, not that of other segments.
            implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
        )


# ---- model ---------------------------------------------------------------------------------------


def norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    half = x_BTNH.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def layer(cfg: Config, batch: Batch, x_BTD: jax.Array, w: Params) -> jax.Array:
    def linear(x, name):
        y = x @ w[name].astype(x.dtype)
        return y + w[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in w else y

    def heads(x, name):
        return linear(x, name).reshape(*x.shape[:2], -1, cfg.head_dim)

    x = norm(x_BTD, w["attn_norm"], cfg.eps)
    segments_BT = batch["segment_ids"]
    attend: Any = jax.nn.dot_product_attention
    attended_BTNH = attend(
        rotate(heads(x, "q"), batch["positions"], cfg.theta),
        rotate(heads(x, "k"), batch["positions"], cfg.theta),
        heads(x, "v"),
        mask=segments_BT[:, None, :, None] == segments_BT[:, None, None, :],
        is_causal=True,
        implementation=cfg.implementation,
    )
    x_BTD += linear(attended_BTNH.reshape(*x.shape[:2], -1), "o")
    x = norm(x_BTD, w["mlp_norm"], cfg.eps)
    return x_BTD + linear(jax.nn.silu(linear(x, "gate")) * linear(x, "up"), "down")


def logits(params: Params, batch: Batch, cfg: Config) -> jax.Array:
    """Return the logits of all tokens, float32 [B, T, V]."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(x_BTD, w):
        return layer(cfg, batch, x_BTD, w), None

    x_BTD = params["embed"][batch["tokens"]].astype(cfg.dtype)
    x_BTD, _ = jax.lax.scan(body, x_BTD, params["layers"])
    x_BTD = norm(x_BTD, params["norm"], cfg.eps)
    head_VD = params["embed" if cfg.tied else "head"].astype(cfg.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)


def summed_loss(params: Params, batch: Batch, cfg: Config) -> jax.Array:
    """Return the weighted sum of the cross-entropies."""
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch, cfg), batch["targets"]
    )
    return (losses_BT * batch["weights"]).sum()


# ---- weights -------------------------------------------------------------------------------------


def shapes(cfg: Config) -> Params:
    """Return the shape of every parameter: matrices [inputs, outputs], all layers stacked."""
    D, F, V = cfg.features, cfg.mlp, cfg.vocab
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    layer_shapes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
    layer_shapes |= {
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
        "attn_norm": (D,),
        "mlp_norm": (D,),
    }
    if cfg.has_biases:
        layer_shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    all_shapes: Params = {"embed": (V, D), "norm": (D,)}
    all_shapes["layers"] = {name: (cfg.layers, *shape) for name, shape in layer_shapes.items()}
    return all_shapes if cfg.tied else all_shapes | {"head": (V, D)}


def load(folder: Path, cfg: Config) -> Params:
    """Read the weights of a Hugging Face folder as float32 onto the device."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        opened = safe_open(file, framework="numpy")
        files |= dict.fromkeys(opened.keys(), opened)

    def read(name: str) -> np.ndarray:
        return files[name].get_tensor(name).astype(np.float32)

    def stacked(name: str) -> jax.Array:
        arrays = [read(f"model.layers.{number}.{name}") for number in range(cfg.layers)]
        return jnp.asarray(np.stack([a.T if a.ndim == 2 else a for a in arrays]))

    in_layer = MATRICES | NORMS | (BIASES if cfg.has_biases else {})
    params: Params = {
        "embed": jnp.asarray(read("model.embed_tokens.weight")),
        "norm": jnp.asarray(read("model.norm.weight")),
        "layers": {name: stacked(hf_name) for name, hf_name in in_layer.items()},
    }
    return params if cfg.tied else params | {"head": jnp.asarray(read("lm_head.weight"))}


def random(cfg: Config) -> Params:
    """Return float32 weights as of a model from scratch, created on the device."""

    def make(path, shape):
        if "norm" in str(path[-1]):
            return jnp.ones(shape)
        key = jax.random.fold_in(jax.random.key(0), hash(str(path)) % 2**31)
        return 0.02 * jax.random.normal(key, shape)

    def make_all() -> Params:
        return jax.tree_util.tree_map_with_path(
            make, shapes(cfg), is_leaf=lambda node: isinstance(node, tuple)
        )

    return jax.jit(make_all)()


# ---- step ----------------------------------------------------------------------------------------


def make_optimizer(numbers: dict[str, float], mu_dtype=None) -> optax.GradientTransformation:
    """Return gradient clipping followed by AdamW, with weight decay on matrices.

    Args:
        mu_dtype: dtype of the first moments, to save memory; the second moments are float32.
    """

    def decayed(params: Params) -> Params:
        decayed_in_layers = {name: name in MATRICES for name in params["layers"]}
        return dict.fromkeys(params, True) | {"norm": False, "layers": decayed_in_layers}

    return optax.chain(
        optax.clip_by_global_norm(numbers["clip_norm"]),
        optax.adamw(
            numbers["learning_rate"],
            b1=numbers["b1"],
            b2=numbers["b2"],
            eps=numbers["eps"],
            weight_decay=numbers["weight_decay"],
            mask=decayed,
            mu_dtype=mu_dtype,
        ),
    )


def make_step(cfg: Config, tx: optax.GradientTransformation):
    """Return the jitted `step(params, opt_state, batch) -> (params, opt_state, mean loss)`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def mean(params):
            return summed_loss(params, batch, cfg) / jnp.maximum(batch["weights"].sum(), 1.0)

        loss, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


# ---- subject of scripts/bench.py -----------------------------------------------------------------


def main() -> None:
    spec = contract.read()
    folder = Path(spec.model)
    cfg = Config.of(json.loads((folder / "config.json").read_text()), spec.dtype)
    has_weights = any(folder.glob("*.safetensors"))
    params = load(folder, cfg) if has_weights else random(cfg)
    before = contract.mean_loss(spec, functools.partial(nll, params, cfg)) if has_weights else None
    tx = make_optimizer(spec.optimizer)
    opt_state = jax.jit(tx.init)(params)
    step, clock, losses = make_step(cfg, tx), contract.Clock(spec), []
    for batch in spec.batches():
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(float(loss))  # waits for the step
        clock.step()
    peak = peak_bytes()
    tokens, trained = contract.counts(spec)
    contract.report(
        how=f"jax.nn ({cfg.implementation} attention, segments as a mask) and optax, layers "
        "scanned and recomputed, logits of all tokens at once",
        packages=["jax", "jaxlib", "optax"],
        step_s=clock.timed,
        losses=losses,
        tokens=tokens,
        trained=trained,
        first_step_s=clock.first_step_s,
        peak_bytes=peak,
        held_out_before=before,
        held_out_after=contract.mean_loss(spec, functools.partial(nll, params, cfg)),
    )


def nll(params: Params, cfg: Config, ids: Sequence[int], mask: Sequence[int]) -> float:
    """Return the summed loss of the trained tokens of a single example."""
    num_tokens = len(ids) - 1
    pad = (0, -num_tokens % 128)  # so that few shapes are compiled
    batch = {
        "tokens": np.pad(ids[:-1], pad),
        "targets": np.pad(ids[1:], pad),
        "weights": np.pad(np.asarray(mask[1:], np.float32), pad),
        "segment_ids": np.pad(np.ones(num_tokens, np.int32), pad),
        "positions": np.pad(np.arange(num_tokens), pad),
    }
    batch = {name: array[None] for name, array in batch.items()}
    return float(jax.jit(summed_loss, static_argnums=2)(params, batch, cfg))


def peak_bytes() -> int:
    """Return the peak memory so far, of the GPU or else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else contract.peak_rss_bytes()


if __name__ == "__main__":
    main()
