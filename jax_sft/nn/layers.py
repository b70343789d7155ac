"""Primitives that model families are written from: linear, norm, embedding, attention, MLP, scan.

Shape suffixes: B rows, T tokens, D model, N heads, K kv heads, H head dim, F mlp, V vocabulary.
Modules are plain pytrees (NNX tree mode): no shared submodules, parameters created from a key.
Parameters multiply in the dtype of the activation; what loses precision runs in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.nn import rope
from jax_sft.nn.compute import Compute
from jax_sft.ops.attention.dispatch import packed_attention
from jax_sft.ops.embedding import lookup
from jax_sft.sharding import collectives, rules

INIT_STD = 0.02  # of matrices made from scratch, as in Hugging Face's initializer_range


Axes = tuple[tuple[str, ...], tuple[str, ...]]  # logical axes: of the inputs, of the outputs


class Linear(nnx.Module):
    """y = x W (+ b), contracting the last dimensions of x.

    With an attribute `lora` (see jax_sft/adapters/lora.py) the product is what that makes of it.

    The kernel has the dimensions of inputs and outputs, in that order or, where `embed` is an
    output, the other way round: what is gathered and scattered is its first dimension, since XLA
    transposes whole arrays for collectives over any other.

    Args:
        inputs: {logical axis: size} of what is contracted, e.g. {"embed": D}.
        outputs: {logical axis: size} of what appears, e.g. {"heads": N, "head_dim": H}.
        key: random key of the normal initialisation; the bias starts at zero.
    """

    lora: Callable[..., jax.Array]  # where it is set

    def __init__(self, inputs: dict[str, int], outputs: dict[str, int], key, bias: bool = False):
        self.axes = tuple(inputs), tuple(outputs)
        sizes = inputs | outputs
        shape = tuple(sizes[axis] for axis in _kernel_axes(self.axes))
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(key, shape))
        if bias:
            self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(_matmul(x, self.kernel[...], self.axes), "dots")
        if hasattr(self, "lora"):
            y = self.lora(x, y, self.kernel[...])
        return _add_bias(y, self.bias[...]) if hasattr(self, "bias") else y


def _kernel_axes(axes: Axes) -> tuple[str, ...]:
    inputs, outputs = axes
    return outputs + inputs if "embed" in outputs else inputs + outputs


def _contract(x: jax.Array, kernel: jax.Array, axes: Axes, over: tuple[str, ...]) -> jax.Array:
    """Multiply in the dtype of x, summing over these axes: the last of x."""
    of_x = range(x.ndim - len(over), x.ndim)
    of_kernel = [_kernel_axes(axes).index(axis) for axis in over]
    return jax.lax.dot_general(x, kernel.astype(x.dtype), ((of_x, of_kernel), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """[batch, tokens, *inputs] x kernel -> [batch, tokens, *outputs]."""
    return _contract(x, kernel, axes, over=axes[0])


def _matmul_fwd(x, kernel, axes):
    return _matmul(x, kernel, axes), (x, kernel)


def _matmul_bwd(axes, residuals, grad):
    x, kernel = residuals
    of_x, of_grad = (("batch", "token", *rules.gathered(some)) for some in axes)
    grad = rules.constrain(grad, *of_grad)
    region = collectives.shard_map_region(
        functools.partial(_kernel_gradient, axes=axes, dtype=kernel.dtype),
        in_specs=(rules.spec(*of_x), rules.spec(*of_grad)),
        out_specs=rules.spec(*_kernel_axes(axes)),
    )
    with jax.named_scope(".".join(("part.gradient", *_kernel_axes(axes)))):
        grad_kernel = region(x, grad)
    return _contract(grad, kernel, axes, over=axes[1]), grad_kernel


def _kernel_gradient(x, grad, *, axes: Axes, dtype):
    """One device's part of the gradient of a kernel, summed over the tokens of all devices.

    It is formed and added up in the dtype of the (gathered) kernel: what each device has, rounded
    to bfloat16 before it is added, would lose more with every device. A shard_map region, since the
    partitioner may gather all activations instead of scattering the sum.
    """
    first, second = (grad, x) if "embed" in axes[1] else (x, grad)
    local = jax.lax.dot_general(
        first, second, (((0, 1), (0, 1)), ((), ())), preferred_element_type=dtype
    )
    return collectives.sum_over_tokens(local, _kernel_axes(axes))


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias to the last dimensions; its gradient is summed in the bias's dtype."""
    return y + bias.astype(y.dtype)


def _add_bias_fwd(y, bias):
    return _add_bias(y, bias), jnp.zeros(bias.shape, bias.dtype)


def _add_bias_bwd(like, grad):
    return grad, grad.astype(like.dtype).sum(range(grad.ndim - like.ndim))


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


@jax.custom_vjp
def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale, in float32."""
    return x * scale


def _scaled_fwd(x, scale):
    return _scaled(x, scale), (x, scale)


def _scaled_bwd(residuals, grad):
    x, scale = residuals
    grad_scale = (grad * x).sum(range(grad.ndim - scale.ndim)).astype(scale.dtype)
    if collectives.platform() == "cpu":
        # It goes into the stack of all layers' as [1, D]. XLA would sum in that shape, for which
        # YNNPACK takes 2.4 ms instead of 0.1 (512 x 576 values).
        grad_scale = jax.lax.optimization_barrier(grad_scale)
    return grad * scale, grad_scale


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang & Sennrich 2019), over the last dimension(s).

    Args:
        sizes: of the dimensions that are normalised together, the last of x.
    """

    def __init__(self, *sizes: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(sizes))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        dims = tuple(range(-self.scale[...].ndim, 0))
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=dims, keepdims=True) + self.eps)
        return _scaled(x32, self.scale[...]).astype(x.dtype)


class CenteredRMSNorm(nnx.Module):
    """x / rms(x) * (1 + offset), in float32: how Gemma stores the scale of its norms.

    Args:
        size: of the last dimension.
    """

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.offset = nnx.Param(jnp.zeros(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return _scaled(x32, 1.0 + self.offset[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A [V, D] table: looked up for tokens and, in tied models, the output head too."""

    def __init__(self, vocab: int, features: int, key):
        self.table = nnx.Param(INIT_STD * jax.random.normal(key, (vocab, features)))

    def __call__(self, tokens_BT: jax.Array, dtype) -> jax.Array:
        return residual(lookup(self.table[...], tokens_BT, dtype))


class Head(nnx.Module):
    """An output head of its own, [D, V]: the gathered dimension first, as in `Linear`."""

    def __init__(self, vocab: int, features: int, key):
        self.table = nnx.Param(INIT_STD * jax.random.normal(key, (features, vocab)))


class GLU(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). Gate and up stay
    separate: less memory."""

    def __init__(
        self,
        features: int,
        mlp: int,
        key,
        activation: Callable[[jax.Array], jax.Array],
        bias: bool = False,
    ):
        self.activation = activation
        gate, up, down = jax.random.split(key, 3)
        self.gate = Linear({"embed": features}, {"mlp": mlp}, gate, bias)
        self.up = Linear({"embed": features}, {"mlp": mlp}, up, bias)
        self.down = Linear({"mlp": mlp}, {"embed": features}, down, bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(self.gate(x_BTD), "mlp")
        up_BTF = checkpoint_name(self.up(x_BTD), "mlp")
        hidden_BTF = self.activation(gate_BTF) * up_BTF
        return self.down(rules.constrain(hidden_BTF, "batch", "token", "mlp"))


def SwiGLU(features: int, mlp: int, key, bias: bool = False) -> GLU:
    """Return a GLU with SiLU, as in Llama."""
    return GLU(features, mlp, key, jax.nn.silu, bias)


def GeGLU(features: int, mlp: int, key) -> GLU:
    """Return a GLU with GELU, approximated by tanh, as in Gemma."""
    return GLU(features, mlp, key, jax.nn.gelu)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    compute: Compute,
    window: int | None = None,
    windowed: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Rotate queries and keys, then attend causally within each segment. Returns [B, T, N, H].

    Args:
        window: a token sees at most so many tokens, itself included.
        windowed: bool scalar, has this layer the window? None = it has.
        scale: of the scores; None = 1 / sqrt(H).
        soft_cap: bound of the scaled scores, see `packed_attention`; 0 = none.
    """
    q_BTNH, k_BTKH = rope.rotate(q_BTNH, angles), rope.rotate(k_BTKH, angles)
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTNH, k_BTKH, v_BTKH))
    return packed_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT,
        positions_BT,
        scale=1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale,
        backend=compute.attention,
        max_segments=compute.max_segments,
        window=window,
        windowed=windowed,
        soft_cap=soft_cap,
    )


class Attention(nnx.Module):
    """Grouped-query attention.

    Args:
        cfg: a family's Config.
        bias, out_bias: have q, k and v one, and has the output projection?
        norms: of q and of k, before they are rotated; empty = there are none.
        scale: of the scores; None = 1 / sqrt(H).
    """

    def __init__(
        self,
        cfg: Any,
        key,
        *,
        bias: bool = False,
        out_bias: bool = False,
        norms: Sequence[Any] = (),
        scale: float | None = None,
    ):
        q, k, v, out = jax.random.split(key, 4)
        features = {"embed": cfg.features}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.q = Linear(features, heads, q, bias)
        self.k = Linear(features, kv_heads, k, bias)
        self.v = Linear(features, kv_heads, v, bias)
        self.out = Linear(heads, features, out, out_bias)
        if norms:
            self.q_norm, self.k_norm = norms
        self.scale, self.soft_cap, self.window = scale, cfg.attention_soft_cap, cfg.window

    def __call__(self, x_BTD: jax.Array, *context, windowed: jax.Array | None = None) -> jax.Array:
        """Return [B, T, D]; the arguments are those of `attend` from `angles` on."""
        q_BTNH, k_BTKH = self.q(x_BTD), self.k(x_BTD)
        if hasattr(self, "q_norm"):
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        options: dict[str, Any] = dict(scale=self.scale, soft_cap=self.soft_cap, window=self.window)
        return self.out(
            attend(q_BTNH, k_BTKH, self.v(x_BTD), *context, windowed=windowed, **options)
        )


def whole(x_BTD: jax.Array) -> jax.Array:
    """Gather what a block reads over `tensor`: every shard of heads or mlp needs all tokens."""
    # Pinned before too, so that what is gathered is the compute dtype and not a norm's float32.
    with jax.named_scope("part.activations"):
        return rules.constrain(residual(x_BTD), "batch", "token", "features")


def residual(x_BTD: jax.Array) -> jax.Array:
    """Split the tokens of what is added to the residual stream over `tensor` too.

    So what the shards of a block have computed is reduce-scattered, and what lives between blocks,
    norms included, takes 1/tensor of the memory (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    return rules.constrain(x_BTD, "batch", "residual", "features")


class PreNorm(nnx.Module):
    """Residual block: attention, then an MLP, the input of each normed."""

    def __init__(self, cfg: Any, attn: Any, mlp: Any):
        self.attn_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = attn
        self.mlp_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = mlp

    def __call__(self, x_BTD, *context):
        x_BTD += residual(self.attn(whole(self.attn_norm(x_BTD)), *context))
        return x_BTD + residual(self.mlp(whole(self.mlp_norm(x_BTD))))


class PrePostNorm(nnx.Module):
    """Residual block: attention, then an MLP, the input and the output of each normed."""

    def __init__(self, cfg: Any, attn: Any, mlp: Any):
        self.attn_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = attn
        self.attn_out_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = mlp
        self.mlp_out_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)

    def __call__(self, x_BTD, windowed, *context):
        attended_BTD = self.attn(whole(self.attn_norm(x_BTD)), *context, windowed=windowed)
        x_BTD += self.attn_out_norm(residual(attended_BTD))
        return x_BTD + self.mlp_out_norm(residual(self.mlp(whole(self.mlp_norm(x_BTD)))))


class Decoder(nnx.Module):
    """Token ids to final hidden states: embedding, equal layers, norm. The head is applied by the
    loss or by `inference`.

    Args:
        make_layer: (cfg, key) -> a module, which is called with (x_BTD, angles, segment_ids_BT,
            positions_BT, compute) and returns the next x_BTD; a layer of experts returns
            (x_BTD, Routing).
        cfg: a family's Config.
    """

    def __init__(self, make_layer: Callable[[Any, jax.Array], Any], cfg: Any, key):
        embed, layers, head = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab, cfg.features, embed)
        self.layers = stack(functools.partial(make_layer, cfg), cfg.num_layers, layers)
        self.final_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        if not cfg.tied:
            self.head = Head(cfg.vocab, cfg.features, head)

    def __call__(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute) -> jax.Array:
        """Return hidden states [B, T, D] in `compute.dtype`, normed and ready for the head."""
        return self.routed(tokens_BT, segment_ids_BT, positions_BT, compute)[0]

    def routed(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute):
        """Return (hidden states, the Routing of all layers; None without experts)."""
        x_BTD = self.embed(tokens_BT, compute.dtype)
        angles = self.cfg.rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
        context = (angles, segment_ids_BT, positions_BT, compute)
        x_BTD, routing = run_routed_stack(
            self.layers, x_BTD, *context, name="layers", compute=compute
        )
        return self.final_norm(x_BTD), routing

    @property
    def head_VD(self) -> jax.Array:
        """The output head [V, D], the master weight: the embedding table when tied."""
        return self.embed.table[...] if self.cfg.tied else self.head.table[...].T


class GemmaDecoder(Decoder):
    """A Decoder with embeddings of norm sqrt(D), centred norms and layers of two kinds.

    Args:
        make_layer: its module is called with (x_BTD, windowed, *angles, segment_ids_BT,
            positions_BT, compute): whether the layer has the window, and the angles of each of
            `cfg.ropes`.
        cfg: a family's Config, with `windowed`, a bool for each layer, and `ropes`.
    """

    def __init__(self, make_layer: Callable[[Any, jax.Array], Any], cfg: Any, key):
        super().__init__(make_layer, cfg, key)
        self.final_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)

    def routed(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute):
        x_BTD = self.embed(tokens_BT, compute.dtype)
        # The factor is rounded too, as in transformers: in bfloat16, sqrt(3584) = 59.87 is 59.75.
        x_BTD *= jnp.asarray(math.sqrt(self.cfg.features), compute.dtype)
        angles = [
            rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
            for rope in self.cfg.ropes
        ]
        context = (*angles, segment_ids_BT, positions_BT, compute)
        each = (jnp.array(self.cfg.windowed),)
        x_BTD = run_stack(self.layers, x_BTD, *context, name="layers", compute=compute, each=each)
        return self.final_norm(x_BTD), None


def stack(make_layer: Callable[[jax.Array], Any], num_layers: int, key) -> Any:
    """Create `num_layers` equal layers as one module whose arrays have a leading layer axis."""
    return jax.vmap(make_layer)(jax.random.split(key, num_layers))


def run_stack(
    layers: Any,
    x_BTD: jax.Array,
    *inputs: Any,
    name: str,
    compute: Compute,
    each: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """Apply stacked layers in turn, `x = layer(x, *of_each, *inputs)`, as one compiled loop body.

    Args:
        name: path of `layers` in the model, as the weight rows have it.
        each: arrays [layers, ...] of which each layer gets its own element: in what layers differ.
    """
    return run_routed_stack(layers, x_BTD, *inputs, name=name, compute=compute, each=each)[0]


def run_routed_stack(
    layers: Any,
    x_BTD: jax.Array,
    *inputs: Any,
    name: str,
    compute: Compute,
    each: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, Any]:
    """The same for layers that may return (x, Routing) instead of x: also return each one's.

    Returns:
        (x, Routing with a leading layer dimension), or (x, None).
    """

    def body(x_BTD, of_layer):
        layer, *of_each = of_layer
        x_BTD = checkpoint_name(x_BTD, "residual")
        found = compute.gathered(layer, name)(x_BTD, *of_each, *inputs)
        x_BTD, routing = found if isinstance(found, tuple) else (found, None)
        return residual(x_BTD), routing

    body = jax.checkpoint(body, policy=compute.policy, prevent_cse=False)
    return jax.lax.scan(body, x_BTD, (layers, *each))
