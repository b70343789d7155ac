"""Mixture of experts: a router that sends each token to its top K SwiGLU experts.

No token is dropped and no expert has a capacity. Tokens are sorted by expert, and each expert
multiplies the rows sent to it. Padding is sent to no expert. Called by the families with experts.

Shape suffixes: E experts, K experts per token, R = T K and M = B T K rows of one device, where a
row is a token at one of its experts; the others as in `layers`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.nn import decoder, layers
from jax_sft.ops import grouped
from jax_sft.sharding import collectives, rules
from jax_sft.weights.hf_config import Fields

_KERNEL = ("experts", "embed", "mlp")
_TOKENS = ("batch", "token", "features")
_RESIDUAL = ("batch", "residual", "features")
_CHOSEN = ("batch", "token", "chosen")
_HIDDEN = ("batch", "token", "mlp")  # the token dimension holds rows, K per token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Statistics of a layer's router over the tokens of all devices, without padding; float32.

    Attributes:
        taken_E: number of tokens sent to each expert.
        probs_E: sum of the probabilities of each expert.
        tokens: number of tokens.
    """

    taken_E: jax.Array
    probs_E: jax.Array
    tokens: jax.Array


def balance_loss(routing: Routing) -> jax.Array:
    """Return the load-balancing loss: E times the sum of (share of tokens x mean probability).

    Equations 4 to 6 of Fedus et al. 2021, arXiv:2101.03961, over the tokens of all layers together,
    like `load_balancing_loss_func` of transformers. The loss is K if all experts are equal.

    Args:
        routing: with a leading layer dimension.
    """
    taken_E, probs_E = routing.taken_E.sum(0), routing.probs_E.sum(0)
    tokens = jnp.maximum(routing.tokens.sum(), 1.0)
    return len(taken_E) * jnp.sum(jax.lax.stop_gradient(taken_E) * probs_E) / tokens**2


def read(fields: Fields, default: tuple[int, int]) -> tuple[int, int, float]:
    """Return (experts, experts per token, weight of the balance loss) of a config.json.

    Args:
        default: the first two values, used if config.json has none.

    Raises:
        ValueError: a value is invalid.
    """
    # transformers 4 and 5 write different names, and both read either.
    local = fields.size("num_local_experts", fields.size("num_experts", default[0]))
    num_experts = fields.size("num_experts", local)
    if local != num_experts:
        raise ValueError(
            f"config.json has num_experts = {num_experts} and num_local_experts = {local}: "
            "keep the right one"
        )
    num_chosen = fields.size("num_experts_per_tok", default[1])
    if num_chosen > num_experts:
        raise ValueError(
            f"config.json: num_experts_per_tok = {num_chosen} is over the {num_experts} experts"
        )
    weight = fields.number("router_aux_loss_coef", 0.001)
    fields.known("output_router_logits")  # the config key loss.router_aux decides
    return num_experts, num_chosen, weight


class MoE(nnx.Module):
    """The weighted sum of a token's top experts, each a SwiGLU.

    The weights are the router's probabilities, a softmax over all experts in float32. They multiply
    the outputs of the experts, and the sum is rounded once.

    Args:
        mlp: inner size of an expert.
        num_chosen: experts per token.
        normalize: whether the weights of a token are normalized to sum to 1.
    """

    def __init__(
        self,
        features: int,
        mlp: int,
        num_experts: int,
        num_chosen: int,
        normalize: bool,
        key,
    ):
        router, gate, up, down = jax.random.split(key, 4)
        self.num_chosen, self.normalize = num_chosen, normalize
        self.router = layers.Linear({"embed": features}, {"experts": num_experts}, router)
        self.gate = ExpertKernel(num_experts, features, mlp, gate)
        self.up = ExpertKernel(num_experts, features, mlp, up)
        self.down = ExpertKernel(num_experts, features, mlp, down)

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, Routing]:
        is_real_BT = segment_ids_BT > 0
        probs_BTE = jax.nn.softmax(self.router(x_BTD).astype(jnp.float32))
        num_experts = probs_BTE.shape[-1]
        chosen_BTK = _best(probs_BTE, self.num_chosen)
        is_chosen_BTKE = chosen_BTK[..., None] == jnp.arange(num_experts)
        weights_BTK = jnp.where(is_chosen_BTKE, probs_BTE[:, :, None], 0.0).sum(-1)
        if self.normalize:
            weights_BTK /= weights_BTK.sum(-1, keepdims=True)
        is_taken_BTE = is_chosen_BTKE.any(2) & is_real_BT[..., None]
        routing = Routing(
            taken_E=is_taken_BTE.astype(jnp.float32).sum((0, 1)),
            probs_E=jnp.where(is_real_BT[..., None], probs_BTE, 0.0).sum((0, 1)),
            tokens=is_real_BT.astype(jnp.float32).sum(),
        )
        chosen_BTK = jnp.where(is_real_BT[..., None], chosen_BTK, num_experts)
        kernels = self.gate.kernel[...], self.up.kernel[...], self.down.kernel[...]
        return _experts(x_BTD, weights_BTK, chosen_BTK, *kernels), routing


class Layer(decoder.PreNorm):
    """Pre-norm residual block: attention, then experts. Also returns the Routing."""

    def __call__(self, x_BTD, angles, segment_ids_BT, *context):
        context = angles, segment_ids_BT, *context
        x_BTD += layers.residual(self.attn(layers.whole(self.attn_norm(x_BTD)), *context))
        y_BTD, routing = self.mlp(layers.whole(self.mlp_norm(x_BTD)), segment_ids_BT)
        return x_BTD + layers.residual(y_BTD), routing


class ExpertKernel(nnx.Module):
    """One matrix per expert, [E, D, F] in either direction of the product, see `layers.Linear`."""

    def __init__(self, num_experts: int, features: int, mlp: int, key):
        shape = num_experts, features, mlp
        self.kernel = nnx.Param(layers.INIT_STD * jax.random.normal(key, shape))


def _best(probs_BTE: jax.Array, num_chosen: int) -> jax.Array:
    """Return the experts of highest probability, int32 [B, T, K].

    This runs in a `shard_map` region, since tokens are independent of each other.
    """
    return jax.shard_map(
        lambda probs: jax.lax.top_k(probs, num_chosen)[1],
        in_specs=rules.spec("batch", "token", "experts"),
        out_specs=rules.spec(*_CHOSEN),
    )(jax.lax.stop_gradient(probs_BTE))


# ---- the experts: each device's tokens, in shard_map regions -------------------------------------


@jax.custom_vjp
def _experts(x_BTD, weights_BTK, chosen_BTK, gate, up, down) -> jax.Array:
    """[B, T, D] -> [B, T, D], with tokens also sharded over `tensor` like the residual stream.

    Args:
        weights_BTK: float32.
        chosen_BTK: expert ids; E means no expert.
        gate, up, down: gathered [E, D, F].
    """
    return _experts_fwd(x_BTD, weights_BTK, chosen_BTK, gate, up, down)[0]


def _experts_fwd(x_BTD, weights_BTK, chosen_BTK, gate, up, down):
    operands = x_BTD, weights_BTK, chosen_BTK, gate, up, down
    y_BTD, *hidden = _shard_map_region(
        _forward,
        (_TOKENS, _CHOSEN, _CHOSEN, *[rules.gathered(_KERNEL)] * 3),
        (_RESIDUAL, _HIDDEN, _HIDDEN),
    )(*operands)
    hidden = [checkpoint_name(checkpoint_name(part, "dots"), "mlp") for part in hidden]
    return y_BTD, (operands, hidden)


def _experts_bwd(residuals, grad_BTD):
    (x_BTD, weights_BTK, chosen_BTK, *kernels), hidden = residuals
    grad_x, grad_weights, *grad_kernels = _shard_map_region(
        _backward,
        (_TOKENS, _TOKENS, _CHOSEN, _CHOSEN, *[rules.gathered(_KERNEL)] * 3, *[_HIDDEN] * 2),
        (_RESIDUAL, _CHOSEN, *[_KERNEL] * 3),
    )(grad_BTD, x_BTD, weights_BTK, chosen_BTK, *kernels, *hidden)
    return grad_x, grad_weights, None, *grad_kernels


_experts.defvjp(_experts_fwd, _experts_bwd)


def _shard_map_region(local, input_axes, output_axes):
    return jax.shard_map(
        local,
        in_specs=tuple(rules.spec(*axes) for axes in input_axes),
        out_specs=tuple(rules.spec(*axes) for axes in output_axes),
        check_vma=False,  # the sums of `grouped` start from constants
    )


def _forward(x_BTD, weights_BTK, chosen_BTK, gate, up, down):
    """Compute one device's tokens with its part of each expert's inner dimension."""
    rows = _Rows.of(chosen_BTK, num_experts=len(gate))
    x_MD = rows.spread(x_BTD)
    gate_MF = grouped.matmul(x_MD, gate, rows.sizes_E, over=1)
    up_MF = grouped.matmul(x_MD, up, rows.sizes_E, over=1)
    y_MD = grouped.matmul(jax.nn.silu(gate_MF) * up_MF, down, rows.sizes_E, over=2)
    y_BTD = _scatter_tokens(rows.collect(y_MD, weights_BTK))
    shape = *chosen_BTK.shape[:1], -1, gate_MF.shape[1]
    return y_BTD, gate_MF.reshape(shape), up_MF.reshape(shape)


def _backward(grad_BTD, x_BTD, weights_BTK, chosen_BTK, gate, up, down, gate_BRF, up_BRF):
    """Return the gradients of x (tokens sharded over `tensor`), weights and kernels (scattered)."""
    rows = _Rows.of(chosen_BTK, num_experts=len(gate))
    x_MD, grad_MD = rows.spread(x_BTD), rows.spread(grad_BTD)
    hidden_MF, activation_vjp = jax.vjp(
        lambda gate_MF, up_MF: jax.nn.silu(gate_MF) * up_MF,
        *(part.reshape(len(x_MD), -1) for part in (gate_BRF, up_BRF)),
    )
    weights_M1 = rows.sorted(weights_BTK)[:, None]
    # Taken before the routing weight is applied. Its dot product with the hidden values equals that
    # of the expert's output, which is not kept, with the gradient of the sum.
    grad_MF = grouped.matmul(grad_MD, down, rows.sizes_E, over=1)
    grad_weights_M = jnp.sum(grad_MF.astype(jnp.float32) * hidden_MF.astype(jnp.float32), axis=-1)
    grad_weights_BTK = collectives.psum(rows.unsorted(grad_weights_M), rules.RULES["mlp"])
    grad_gate_MF, grad_up_MF = activation_vjp((weights_M1 * grad_MF).astype(grad_MF.dtype))
    grad_x_MD = grouped.matmul(grad_gate_MF, gate, rows.sizes_E, over=2)
    grad_x_MD += grouped.matmul(grad_up_MF, up, rows.sizes_E, over=2)
    weighted_MF = (weights_M1 * hidden_MF).astype(hidden_MF.dtype)
    with jax.named_scope(".".join(("part.gradient", *_KERNEL))):  # shown by `plan`
        grad_kernels = [
            collectives.sum_over_tokens(grouped.outer(*pair, rows.sizes_E, gate.dtype), _KERNEL)
            for pair in ((x_MD, grad_gate_MF), (x_MD, grad_up_MF), (grad_MD, weighted_MF))
        ]
    ones_BTK = jnp.ones_like(weights_BTK)
    return _scatter_tokens(rows.collect(grad_x_MD, ones_BTK)), grad_weights_BTK, *grad_kernels


def _scatter_tokens(part_BTD: jax.Array) -> jax.Array:
    """Reduce-scatter partial sums over the axis of `mlp`, along the token dimension."""
    (axis,) = rules.RULES["mlp"]
    return collectives.psum_scatter(part_BTD, axis, scatter_dimension=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """One device's rows, sorted by expert; rows without an expert come last.

    Attributes:
        order_M: for each sorted row, its flat index in [B, T, K].
        places_BTK: the inverse permutation.
        sizes_E: rows of each expert.
    """

    order_M: jax.Array
    places_BTK: jax.Array
    sizes_E: jax.Array

    @classmethod
    def of(cls, chosen_BTK: jax.Array, num_experts: int) -> "_Rows":
        chosen_M = chosen_BTK.reshape(-1)
        order_M = jnp.argsort(chosen_M)  # stable
        return cls(
            order_M=order_M,
            places_BTK=jnp.argsort(order_M).reshape(chosen_BTK.shape),
            sizes_E=(chosen_M[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32),
        )

    def spread(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [M, D]: each token once per expert."""
        num_chosen = self.places_BTK.shape[-1]
        return x_BTD.reshape(-1, x_BTD.shape[-1])[self.order_M // num_chosen]

    def collect(self, y_MD: jax.Array, weights_BTK: jax.Array) -> jax.Array:
        """[M, D] -> [B, T, D]: the weighted sum over a token's experts, in float32."""
        return (weights_BTK[..., None] * y_MD[self.places_BTK]).sum(2).astype(y_MD.dtype)

    def sorted(self, values_BTK: jax.Array) -> jax.Array:
        """[B, T, K] -> [M]."""
        return values_BTK.reshape(-1)[self.order_M]

    def unsorted(self, values_M: jax.Array) -> jax.Array:
        """[M] -> [B, T, K]."""
        return values_M[self.places_BTK]
