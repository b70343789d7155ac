"""4-bit weights of frozen linear layers: NF4 with double quantization, as in QLoRA.

Dettmers et al. 2023, arXiv:2305.14314. A block is BLOCK consecutive inputs of one output, as in
bitsandbytes. Its weights are divided by their largest magnitude and rounded to the nearest of 16
CODES. The magnitudes are stored linearly in 8 bits, as distances from the mean of the layer with
one float32 scale per output (bitsandbytes has a table of 256 values and a scale per 256
magnitudes). A weight takes 4.13 to 4.6 bits. A layer is dequantized only for its products.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_sft.nn.layers import Linear
from jax_sft.nn.model_def import ModelDef
from jax_sft.sharding import rules
from jax_sft.weights import tree
from jax_sft.weights.param_spec import ParamSpec

BLOCK = 64  # weights per magnitude
# Quantiles of a normal distribution: 7 below zero, zero and 8 above, scaled to -1 and 1. The values
# are those of bitsandbytes (functional.py, get_4bit_type).
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_STEPS = 127  # steps of a magnitude on either side of the mean
PARTS = ("codes", "magnitudes", "scale", "mean")
DTYPES = {"codes": np.uint8, "magnitudes": np.int8, "scale": np.float32, "mean": np.float32}


# ---- numbers -------------------------------------------------------------------------------------


def quantize(kernel: jax.Array, inputs_last: bool) -> dict[str, jax.Array]:
    """Return the PARTS of a kernel [inputs, *outputs] or, with `inputs_last`, [*outputs, inputs].

    codes: uint8 [inputs / 2, *outputs], two codes per byte, the first in the upper half.
    magnitudes: int8 [inputs / BLOCK, *outputs]. scale: float32 [*outputs]. mean: float32 scalar.
    """
    axis = kernel.ndim - 1 if inputs_last else 0
    blocks = _split(kernel.astype(jnp.float32), axis, BLOCK)
    largest = jnp.abs(blocks).max(axis + 1)
    divided = blocks / jnp.expand_dims(jnp.where(largest > 0, largest, 1.0), axis + 1)
    middles = [(low + high) / 2 for low, high in zip(CODES, CODES[1:], strict=False)]
    codes = jnp.zeros(divided.shape, jnp.uint8)
    for middle in middles:
        codes += (divided > middle).astype(jnp.uint8)
    pairs = _split(codes.reshape(kernel.shape), axis, 2)
    first, second = (jnp.take(pairs, place, axis + 1) for place in (0, 1))
    mean = largest.mean()
    scale = jnp.abs(largest - mean).max(axis) / _STEPS
    steps = (largest - mean) / jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), axis)
    return {
        "codes": first << 4 | second,
        "magnitudes": jnp.round(steps).astype(jnp.int8),
        "scale": scale,
        "mean": mean,
    }


def dequantize(parts: Mapping[str, jax.Array], inputs_last: bool, dtype=jnp.float32) -> jax.Array:
    """Return the kernel stored by `quantize`, computed in float32."""
    axis = parts["codes"].ndim - 1 if inputs_last else 0
    largest = parts["magnitudes"] * jnp.expand_dims(parts["scale"], axis) + parts["mean"]
    codes = jnp.stack([parts["codes"] >> 4, parts["codes"] & 15], axis + 1)
    values = jnp.array(CODES, jnp.float32)[codes]
    blocks = _split(_joined(values, axis), axis, BLOCK) * jnp.expand_dims(largest, axis + 1)
    return _joined(blocks, axis).astype(dtype)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Split a dimension into (parts, size)."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _joined(x: jax.Array, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


# ---- a model with quantized weights --------------------------------------------------------------


class Packed(nnx.Module):
    """Replacement for the kernel of a `Linear`: `packed[...]` dequantizes it.

    Args:
        shape: shape of the kernel.
        num_inputs: number of dimensions that are inputs.
        dtype: dtype of the dequantized kernel.
    """

    def __init__(self, shape: Sequence[int], num_inputs: int, inputs_last: bool, dtype):
        self.shape, self.inputs_last, self.dtype = tuple(shape), inputs_last, jnp.dtype(dtype)
        flat = _flat(shape, num_inputs, inputs_last)
        for name, part in jax.eval_shape(
            functools.partial(quantize, inputs_last=inputs_last), jnp.zeros(flat)
        ).items():
            setattr(self, name, nnx.Param(jnp.zeros(part.shape, part.dtype)))

    def __getitem__(self, _) -> jax.Array:
        parts = {name: getattr(self, name)[...] for name in PARTS}
        return dequantize(parts, self.inputs_last, self.dtype).reshape(self.shape)


def _flat(shape: Sequence[int], num_inputs: int, inputs_last: bool) -> tuple[int, ...]:
    """Return the shape of a kernel with its inputs flattened into one dimension."""
    if inputs_last:
        outputs = shape[: len(shape) - num_inputs]
        return *outputs, math.prod(shape[len(outputs) :])
    return math.prod(shape[:num_inputs]), *shape[num_inputs:]


def pack(model_def: ModelDef) -> ModelDef:
    """Return the model with the frozen kernels of its linear layers quantized to 4 bits.

    Raises:
        ValueError: the number of inputs of a layer is not a multiple of BLOCK.
    """
    model = tree.from_dict(model_def.abstract, tree.to_dict(model_def.abstract))  # a copy
    with_dropout = model_def.with_dropout
    if with_dropout is not None:
        with_dropout = tree.from_dict(with_dropout, tree.to_dict(with_dropout))
    quantized, axis_sizes, frozen = {}, dict(model_def.axis_sizes), dict(model_def.frozen_dtypes)
    for spec in model_def.specs:
        linear = tree.module_at(model, spec.path)
        is_kernel = isinstance(linear, Linear) and spec.path.endswith(".kernel")
        # Routers are small and stay as they are.
        if not is_kernel or spec.path not in frozen or "experts" in spec.axes:
            continue
        inputs, outputs = linear.axes
        num_inputs = math.prod(axis_sizes[axis] for axis in inputs)
        if num_inputs % BLOCK:
            raise ValueError(
                f"lora.quantize: {spec.hf} has {num_inputs} inputs, no multiple of {BLOCK}"
            )
        quantized[spec.path] = _part_specs(spec, inputs, outputs)
        for size in (2, BLOCK):
            axis_sizes[f"{inputs[0]}/{size}"] = num_inputs // size
        del frozen[spec.path]
        frozen |= {f"{spec.path}.{part}": np.dtype(DTYPES[part]) for part in PARTS}
        num_stacked = len(spec.stacked)
        shape = spec.shape(axis_sizes)
        make = functools.partial(
            Packed, shape[num_stacked:], len(inputs), "embed" in outputs, model_def.compute.dtype
        )
        for size in reversed(shape[:num_stacked]):
            make = functools.partial(_stacked, make, size)
        for abstract in (model, with_dropout):
            if abstract is not None:
                tree.module_at(abstract, spec.path).kernel = jax.eval_shape(make)
    axes = dict(model_def.compute.axes)
    for path, specs in quantized.items():
        del axes[path]
        axes |= {
            spec.path: spec.axes for spec in specs if spec.path.endswith(("codes", "magnitudes"))
        }
    return dataclasses.replace(
        model_def,
        axis_sizes=axis_sizes,
        abstract=model,
        with_dropout=with_dropout,
        compute=dataclasses.replace(model_def.compute, axes=axes),
        frozen_dtypes=frozen,
        quantized=quantized,
    )


def _stacked(make, size: int):
    return jax.vmap(lambda _: make())(jnp.arange(size))


def _part_specs(
    spec: ParamSpec, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[ParamSpec, ...]:
    """Return the specs of the PARTS of a kernel, which have no tensors in the files."""
    outs = " ".join(outputs)

    def part(name: str, axes: str) -> ParamSpec:
        return ParamSpec(f"{spec.path}.{name}", f"{spec.hf}.{name}", f"{axes} -> {axes}")

    def over(size: int) -> str:
        axis = f"{inputs[0]}/{size}"
        return f"{outs} {axis}" if "embed" in outputs else f"{axis} {outs}"

    return (
        part("codes", over(2)),
        part("magnitudes", over(BLOCK)),
        part("scale", outs),
        part("mean", ""),
    )


def packed_arrays(
    model_def: ModelDef, path: str, kernel: jax.Array, mesh: Mesh
) -> dict[str, jax.Array]:
    """Quantize a whole kernel, one layer at a time. Return {path of a part: sharded array}."""
    specs = model_def.quantized[path]
    pack_layer = functools.partial(_packed_layer, **_form(model_def, path))

    def pack_layers(kernel: jax.Array) -> dict[str, jax.Array]:
        do: Callable[[Any], Any] = pack_layer
        for _ in specs[0].stacked:
            do = functools.partial(jax.lax.map, do)
        return {f"{path}.{name}": part for name, part in do(kernel).items()}

    shardings = {spec.path: rules.sharding(mesh, *spec.axes) for spec in specs}
    return jax.jit(pack_layers, out_shardings=shardings)(kernel)


def both_ways(model_def: ModelDef, path: str, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize the kernel of one layer. Return (codes, dequantized kernel in float32)."""
    codes, unpacked = _both_ways(kernel, **_form(model_def, path))
    return np.asarray(codes), np.asarray(unpacked)


@functools.partial(jax.jit, static_argnames=("num_inputs", "inputs_last"))
def _both_ways(kernel, num_inputs: int, inputs_last: bool) -> tuple[jax.Array, jax.Array]:
    parts = _packed_layer(kernel, num_inputs, inputs_last)
    return parts["codes"], dequantize(parts, inputs_last).reshape(kernel.shape)


def _packed_layer(kernel, num_inputs: int, inputs_last: bool) -> dict[str, jax.Array]:
    return quantize(kernel.reshape(_flat(kernel.shape, num_inputs, inputs_last)), inputs_last)


def _form(model_def: ModelDef, path: str) -> dict[str, Any]:
    """Return the number of input dimensions of a layer's kernel and whether they come last."""
    linear = tree.module_at(model_def.abstract, path)
    inputs, outputs = linear.axes
    return {"num_inputs": len(inputs), "inputs_last": "embed" in outputs}
