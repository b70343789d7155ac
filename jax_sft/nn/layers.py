"""Building blocks of the model families: linear, norm, embedding, head, MLP.

Shape suffixes: B rows, T tokens, D model, F mlp, V vocabulary.
Modules are plain pytrees (NNX tree mode): no shared submodules, parameters created from a key.
Parameters multiply in the dtype of the activations. Precision-sensitive operations are float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.ops.embedding import lookup
from jax_sft.sharding import collectives, rules

INIT_STD = 0.02  # of matrices initialized from scratch, as Hugging Face's initializer_range


Axes = tuple[tuple[str, ...], tuple[str, ...]]  # logical axes of (inputs, outputs)


class Linear(nnx.Module):
    """y = x W (+ b), contracting the last dimensions of x.

    An attribute `lora` (see jax_sft/adapters/lora.py), if set, modifies the product.

    The kernel has the dimensions inputs + outputs or, if `embed` is an output, outputs + inputs. So
    the dimension that is gathered and scattered comes first; for collectives over any other, XLA
    transposes whole arrays.

    Args:
        inputs: {logical axis: size} of the contracted dimensions, e.g. {"embed": D}.
        outputs: {logical axis: size} of the new dimensions, e.g. {"heads": N, "head_dim": H}.
        key: random key of the normal initialization; the bias starts at zero.
    """

    lora: Callable[..., jax.Array]  # set only on layers with an adapter

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
    """Multiply in the dtype of x and contract the axes `over`, which are the last ones of x."""
    x_dims = range(x.ndim - len(over), x.ndim)
    kernel_dims = [_kernel_axes(axes).index(axis) for axis in over]
    return jax.lax.dot_general(x, kernel.astype(x.dtype), ((x_dims, kernel_dims), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """[batch, tokens, *inputs] x kernel -> [batch, tokens, *outputs]."""
    return _contract(x, kernel, axes, over=axes[0])


def _matmul_fwd(x, kernel, axes):
    return _matmul(x, kernel, axes), (x, kernel)


def _matmul_bwd(axes, residuals, grad):
    x, kernel = residuals
    x_axes, grad_axes = (("batch", "token", *rules.gathered(logical)) for logical in axes)
    grad = rules.constrain(grad, *grad_axes)
    region = collectives.shard_map_region(
        functools.partial(_kernel_gradient, axes=axes, dtype=kernel.dtype),
        in_specs=(rules.spec(*x_axes), rules.spec(*grad_axes)),
        out_specs=rules.spec(*_kernel_axes(axes)),
    )
    with jax.named_scope(".".join(("part.gradient", *_kernel_axes(axes)))):
        grad_kernel = region(x, grad)
    return _contract(grad, kernel, axes, over=axes[1]), grad_kernel


def _kernel_gradient(x, grad, *, axes: Axes, dtype):
    """Return one device's part of a kernel's gradient, summed over the tokens of all devices.

    It is computed and summed in the dtype of the (gathered) kernel. Rounding each device's part to
    bfloat16 before the sum would lose more precision with every device. This runs in a shard_map
    region, since the partitioner may gather all activations instead of scattering the sum.
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
        # The gradient is written into the stack of all layers as [1, D]. Without the barrier XLA
        # sums in that shape, which takes YNNPACK 2.4 ms instead of 0.1 (512 x 576 values).
        grad_scale = jax.lax.optimization_barrier(grad_scale)
    return grad * scale, grad_scale


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang & Sennrich 2019), over the last dimension(s).

    Args:
        sizes: sizes of the dimensions that are normalized together, the last ones of x.
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
    """x / rms(x) * (1 + offset), in float32, as Gemma stores the scale of its norms.

    Args:
        size: size of the last dimension.
    """

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.offset = nnx.Param(jnp.zeros(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return _scaled(x32, 1.0 + self.offset[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A [V, D] table for the token lookup, in tied models also the output head."""

    def __init__(self, vocab: int, features: int, key):
        self.table = nnx.Param(INIT_STD * jax.random.normal(key, (vocab, features)))

    def __call__(self, tokens_BT: jax.Array, dtype) -> jax.Array:
        return residual(lookup(self.table[...], tokens_BT, dtype))


class Head(nnx.Module):
    """A separate output head [D, V], with the gathered dimension first as in `Linear`."""

    def __init__(self, vocab: int, features: int, key):
        self.table = nnx.Param(INIT_STD * jax.random.normal(key, (features, vocab)))


class GLU(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    Gate and up are separate matrices, which takes less memory.
    """

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


def whole(x_BTD: jax.Array) -> jax.Array:
    """Gather the input of a block over `tensor`: each shard of heads or mlp needs all tokens."""
    # Constrained before the gather too, so that it moves the compute dtype, not a norm's float32.
    with jax.named_scope("part.activations"):
        return rules.constrain(residual(x_BTD), "batch", "token", "features")


def residual(x_BTD: jax.Array) -> jax.Array:
    """Shard the tokens of a block's output, for the residual stream, over `tensor` too.

    The partial sums of a block's shards are then reduce-scattered, and activations between blocks,
    including norms, take 1/tensor of the memory (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    return rules.constrain(x_BTD, "batch", "residual", "features")
