"""LoRA: low-rank updates of the linear layers of a model with frozen weights.

y = W x + s B A x (Hu et al. 2021, arXiv:2106.09685), A [rank, inputs], B [outputs, rank], with
s = alpha / rank or, rank-stabilized, alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
DoRA (Liu et al. 2024, arXiv:2402.09353) also learns the length of each output's weights. Names and
numbers follow PEFT, so that PEFT can load the trained adapters.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sft.nn.layers import Linear
from jax_sft.nn.model_def import ModelDef
from jax_sft.runtime import patterns
from jax_sft.sharding import collectives, rules
from jax_sft.weights import tree
from jax_sft.weights.param_spec import ParamSpec

ALL_LINEAR = "all-linear"
_HF = "base_model.model."  # PEFT's prefix of the names of a model's modules


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Settings of the adapters, see the keys `lora.*` of the config.

    Attributes:
        targets: "all-linear", or regular expressions that match the names of linear layers in the
            Hugging Face model, or an ending of a name after any dot: "q_proj".
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False
    dora: bool = False
    quantize: str = ""

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _rank_axes(outputs: Iterable[str]) -> tuple[str, str]:
    """Return the logical axis of the rank in A and in B.

    The rank is sharded over `tensor` in whichever of A and B touches the model dimension. The
    adapter's output is then a partial sum like the layer's own, and one reduction serves both.
    """
    return ("whole_rank", "rank") if "embed" in outputs else ("rank", "whole_rank")


# ---- the module ----------------------------------------------------------------------------------


class Adapter(nnx.Module):
    """The adapter of a `Linear`, called with the layer's input, product and kernel.

    Args:
        inputs, outputs: {logical axis: size} of the linear layer.
        drops: whether the adapter has a random key and applies dropout to its input.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        settings: AdapterSettings,
        key,
        drops: bool = False,
    ):
        self.axes, self.scale = (tuple(inputs), tuple(outputs)), settings.scale
        self.dropout = settings.dropout
        a_outputs, b_inputs = ({axis: settings.rank} for axis in _rank_axes(outputs))
        self.a = Linear(inputs, a_outputs, key)
        self.b = Linear(b_inputs, outputs, key)
        if settings.dora:
            self.magnitude = nnx.Param(jnp.ones(tuple(outputs.values())))
        if drops:
            self.key = nnx.Variable(key)

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array) -> jax.Array:
        dropped = self._drop(x) if hasattr(self, "key") else x
        update = self.scale * self.b(self.a(dropped))
        if not hasattr(self, "magnitude"):
            return y + update
        a, b = self.a.kernel[...], self.b.kernel[...]
        # As the paper proposes (section 4.3), no gradient flows through the length.
        length = jax.lax.stop_gradient(lengths(kernel, a, b, self.scale, self.axes))
        return ((y + update) * (self.magnitude[...] / length)).astype(y.dtype)

    def _drop(self, x: jax.Array) -> jax.Array:
        """Zero a share of the values of x [B, T, ...] and scale the others up."""
        keep = 1 - self.dropout
        # Drawn in row order, then interleaved like the tokens, so the result is the same on every
        # mesh.
        kept = collectives.interleave(jax.random.bernoulli(self.key[...], keep, x.shape))
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


def lengths(kernel, a, b, scale: float, axes) -> jax.Array:
    """Return the Euclidean length of each output's weights in W + scale B A, float32.

    Args:
        kernel, a, b: the kernels of a Linear with these (inputs, outputs), and of its adapter.

    |w + s u|^2 = |w|^2 + 2 s w.u + s^2 |u|^2 with u = A' b, so W + scale B A is never formed.
    """
    inputs, outputs = axes
    letter = dict(zip((*inputs, *outputs), "ijklmn", strict=False))

    def of(*names: str) -> str:
        return "".join(letter[name] for name in names)

    ins, outs = of(*inputs), of(*outputs)
    w_order = outs + ins if "embed" in outputs else ins + outs
    b_order = outs + "r" if "embed" in outputs else "r" + outs
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    kernel_squares = einsum(f"{w_order},{w_order}->{outs}", kernel, kernel)
    projected = einsum(f"{w_order},{ins}r->{b_order}", kernel, a)
    mixed = einsum(f"{b_order},{b_order}->{outs}", projected, b)
    gram = einsum(f"{ins}r,{ins}q->rq", a, a)
    update_squares = einsum(f"{b_order},rq,{b_order.replace('r', 'q')}->{outs}", b, gram, b)
    return jnp.sqrt(kernel_squares + 2 * scale * mixed + scale**2 * update_squares)


def merged(kernel, a, b, magnitude, settings: AdapterSettings, outputs_first: bool) -> np.ndarray:
    """Return the kernel with its adapter merged into it, float32 (NumPy).

    Args:
        kernel: [inputs, outputs] or, with `outputs_first`, [outputs, inputs], with all inputs.
        a: [inputs, rank].
        b: [rank, outputs] or, with `outputs_first`, [outputs, rank].
        magnitude: [outputs]; None = no DoRA.
    """
    kernel, a, b = (np.asarray(array, np.float32) for array in (kernel, a, b))
    update = b @ a.T if outputs_first else a @ b
    updated = kernel + np.float32(settings.scale) * update
    if magnitude is None:
        return updated
    axis = 1 if outputs_first else 0
    factor = np.asarray(magnitude, np.float32) / np.sqrt(np.square(updated).sum(axis))
    return updated * np.expand_dims(factor, axis)


# ---- a model with adapters -----------------------------------------------------------------------


def add(model_def: ModelDef, settings: AdapterSettings) -> ModelDef:
    """Return the model with adapters and all other weights frozen. Allocates no arrays.

    Raises:
        ValueError: a target matches no linear layer of the model; the message lists the layers.
    """
    chosen = _chosen(model_def, settings)
    specs, trained = list(model_def.specs), {}
    for spec in model_def.specs:
        if spec.path in chosen:
            new_specs = adapter_specs(spec, settings)
            specs += new_specs
            if not chosen[spec.path].all():
                trained |= {new_spec.path: chosen[spec.path] for new_spec in new_specs}
    axis_sizes = model_def.axis_sizes | {"rank": settings.rank, "whole_rank": settings.rank}
    axis_sizes |= {f"ranks_of_{n}": n * settings.rank for n in {len(spec.fused) for spec in specs}}
    compute = dataclasses.replace(
        model_def.compute, axes={spec.path: spec.axes for spec in specs if spec.is_matrix}
    )
    return dataclasses.replace(
        model_def,
        specs=tuple(specs),
        axis_sizes=axis_sizes,
        abstract=_attached(model_def, chosen, settings),
        compute=compute,
        frozen_dtypes=model_def.without_masters(spec.path for spec in model_def.specs),
        layer_masks=trained,
        with_dropout=_attached(model_def, chosen, settings, True) if settings.dropout else None,
    )


def modules(model_def: ModelDef) -> dict[str, list[str]]:
    """Return {path of a kernel: names of its linear layers in the Hugging Face model}."""
    return {
        spec.path: [module_of(name) for _, name in spec.hf_tensors(model_def.axis_sizes)]
        for spec in model_def.specs
        if isinstance(tree.module_at(model_def.abstract, spec.path), Linear)
        and spec.path.endswith(".kernel")
        and "experts" not in spec.axes  # PEFT does not support adapters for routers
    }


def module_of(hf_name: str) -> str:
    """Return the name of the module that a tensor of the Hugging Face model belongs to."""
    return hf_name.rpartition(".")[0]


def target_of(hf_name: str) -> str:
    """Return the name of the linear layer that a tensor of an adapter belongs to."""
    return module_of(hf_name.removesuffix(".weight")).removeprefix(_HF)


def adapter_specs(spec: ParamSpec, settings: AdapterSettings) -> list[ParamSpec]:
    """Return the parameter specs of a linear layer's adapter, from the spec of its kernel.

    If a tensor of the files holds several kernels, each has its own A and B. In adapter files, the
    A's are stacked along the rank and the B's are block-diagonal, see `peft.joined`.
    """
    (outputs, inputs), stem = spec.factors, spec.path.removesuffix(".kernel") + ".lora"
    hf = _HF + module_of(spec.hf)
    ins, outs = " ".join(inputs), " ".join(outputs)
    r_a, r_b = _rank_axes(outputs)
    b_layout = f"{outs} {r_b}" if "embed" in outputs else f"{r_b} {outs}"
    a_axes = tuple(r_a for _ in spec.fused)

    def part(path: str, name: str, layout: str, fused: tuple[str, ...] = spec.fused) -> ParamSpec:
        return ParamSpec(f"{stem}.{path}", f"{hf}.{name}", layout, fused, spec.place)

    specs = [
        part("a.kernel", "lora_A.weight", f"{r_a} ({ins}) -> {ins} {r_a}", a_axes),
        part("b.kernel", "lora_B.weight", f"({outs}) {r_b} -> {b_layout}"),
    ]
    if settings.dora:
        outs = outs.replace("embed", "norm")  # the axis of a bias
        specs.append(part("magnitude", "lora_magnitude_vector", f"({outs}) -> {outs}"))
    return specs


def init(
    model_def: ModelDef,
    settings: AdapterSettings,
    frozen: Mapping[str, jax.Array],
    mesh,
    seed: int,
    dtype,
) -> dict[str, jax.Array]:
    """Return new sharded adapters with which the model computes the same as without them.

    A is uniform within +-1 / sqrt(inputs) and B is zero, as in PEFT.

    Args:
        frozen: {path: weight} of the model.
        dtype: dtype of the adapters.
    """
    key = jax.random.key(seed)
    specs = {spec.path: spec for spec in model_def.trainable_specs}
    shapes = {path: spec.shape(model_def.axis_sizes) for path, spec in specs.items()}

    def make(frozen):
        arrays = {path: jnp.zeros(shape, dtype) for path, shape in shapes.items()}
        for path, spec in specs.items():
            if path.endswith(".a.kernel"):
                bound = 1 / math.sqrt(math.prod(shapes[path][len(spec.stacked) : -1]))
                param_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                arrays[path] = jax.random.uniform(param_key, shapes[path], dtype, -bound, bound)
        if settings.dora:
            model = model_def.bind(dict(frozen) | arrays)
            for path, spec in specs.items():
                if path.endswith(".magnitude"):
                    layer_lengths = _lengths
                    for _ in spec.stacked:
                        layer_lengths = jax.vmap(layer_lengths)
                    stem = path.removesuffix(".lora.magnitude")
                    arrays[path] = layer_lengths(tree.module_at(model, f"{stem}.kernel")).astype(
                        dtype
                    )
        return arrays

    shardings = {path: rules.sharding(mesh, *spec.axes) for path, spec in specs.items()}
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)(frozen if settings.dora else {})


def _lengths(linear: Linear) -> jax.Array:
    """Return the `lengths` of a layer with an adapter."""
    adapter: Any = linear.lora
    a, b = adapter.a.kernel[...], adapter.b.kernel[...]
    return lengths(linear.kernel[...], a, b, adapter.scale, linear.axes)


def _chosen(model_def: ModelDef, settings: AdapterSettings) -> dict[str, np.ndarray]:
    """Return {path of a kernel: which layers get an adapter} for kernels with at least one."""
    known = modules(model_def)
    specs = {spec.path: spec for spec in model_def.specs}
    all_names = [name for names in known.values() for name in names]
    expressions = [target for target in settings.targets if target != ALL_LINEAR]
    answers = patterns.matches("lora.targets", expressions, all_names, "ending")
    unused = [
        target for target, answer in zip(expressions, answers, strict=True) if not any(answer)
    ]
    all_linear = [[True] * len(all_names)] * (ALL_LINEAR in settings.targets)
    is_chosen = np.array([[False] * len(all_names), *answers, *all_linear]).any(0)
    ends, chosen = np.cumsum([len(names) for names in known.values()]), {}
    for path, layers in zip(known, np.split(is_chosen, ends[:-1]), strict=True):
        if layers.any():
            chosen[path] = layers.reshape(
                [model_def.axis_sizes[axis] for axis in specs[path].stacked]
            )
    if unused or not chosen:
        first = [names[0] for names in known.values()]
        raise ValueError(
            f"lora.targets, or target_modules of an adapter: {unused} matches no linear layer that "
            f"can have an adapter. There are {', '.join(first)}, and the same in the other layers; "
            f'use endings of these, regular expressions, or "{ALL_LINEAR}"'
        )
    return chosen


def _attached(
    model_def: ModelDef,
    chosen: Mapping[str, np.ndarray],
    settings: AdapterSettings,
    drops: bool = False,
):
    """Return the abstract model with an adapter in each chosen linear layer."""
    model = tree.from_dict(model_def.abstract, tree.to_dict(model_def.abstract))  # a copy
    for path, layers in chosen.items():
        linear = tree.module_at(model, path)
        inputs, outputs = (
            {axis: model_def.axis_sizes[axis] for axis in axes} for axes in linear.axes
        )
        make = functools.partial(Adapter, inputs, outputs, settings, drops=drops)
        for _ in layers.shape:
            make = jax.vmap(make)
        keys = jax.eval_shape(lambda shape=layers.shape: jax.random.split(jax.random.key(0), shape))
        linear.lora = jax.eval_shape(make, keys)
    return model
