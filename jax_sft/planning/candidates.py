"""Estimate which settings are worth compiling: meshes, micro-batches and remat policies.

The estimates are arithmetic only. They rank the settings and exclude those that cannot fit; `plan`
compiles the best ones and uses the compiler's figures.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from jax_sft.hardware import Chip
from jax_sft.planning.roofline import Prediction, Traffic, predict
from jax_sft.planning.step_cost import HEAD_CHUNK, RowWork, StepCost, recomputed, step_cost
from jax_sft.sharding import rules
from jax_sft.weights.param_spec import ParamSpec

# Policies tried for model.remat, from the one that keeps the most activations to the least.
REMATS = (
    "none",
    "qkv,attention,attention_lse,mlp",
    "qkv,attention,attention_lse",
    "attn",
    "full",
)
COMPUTE_BYTES = 2  # bfloat16 activations and gathered weights
SUM_BYTES = 4  # gradients are accumulated in float32


@dataclasses.dataclass(frozen=True)
class Model:
    """The properties of a model that the estimates need: its weights, sizes and dtypes.

    Attributes:
        param_bytes, moment_bytes: bytes of a master weight and of each of its two moments.
        grad_bytes: bytes of a gradient element while it is reduced over devices.
        frozen: {path: bytes per element} of the frozen weights.
    """

    specs: Sequence[ParamSpec]
    axis_sizes: Mapping[str, int]
    tied: bool
    param_bytes: int = 4
    moment_bytes: int = 4
    grad_bytes: int = 4
    frozen: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings that a search chooses.

    Attributes:
        mesh: {axis: size} of all axes.
        micro_rows: rows per forward and backward pass, over all devices.
        remat: as in model.remat.
    """

    mesh: dict[str, int]
    micro_rows: int
    remat: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimated bytes of one device.

    Attributes:
        residuals: activations that the layers keep for the backward pass.
        workspace: the larger of two: a gathered layer with its gradient and activations, and the
            gathered head with its gradient and a chunk of logits.
    """

    parameters: float
    moments: float
    gradients: float
    residuals: float
    workspace: float

    @property
    def peak(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting with its estimated memory and time."""

    setting: Setting
    memory: Memory
    prediction: Prediction
    fits: bool


def candidates(
    model: Model,
    chip: Chip,
    *,
    hosts: int,
    gpus_per_host: int,
    num_rows: int,
    row: RowWork,
    attention: str,
    remats: Sequence[str] = REMATS,
    headroom: float = 0.1,
) -> list[Candidate]:
    """Return all valid settings: those that fit first, then by predicted step time.

    Args:
        num_rows: rows per optimizer step.
        row: length and work of the mean row.
        headroom: share of the GPU memory that must stay free.
    """
    num_devices = hosts * gpus_per_host
    estimated = []
    for setting in settings(model, num_devices, gpus_per_host, num_rows, int(row.slots), remats):
        memory = analytic_memory(model, setting, num_rows, int(row.slots))
        cost = step_cost(
            model.specs,
            model.axis_sizes,
            model.tied,
            row,
            num_rows=num_rows,
            micro_batches=num_rows // setting.micro_rows,
            remat=setting.remat,
            attention=attention,
            sizes=setting.mesh,
            param_bytes=model.param_bytes,
            moment_bytes=model.moment_bytes,
            frozen=model.frozen,
        )
        traffic = analytic_traffic(model, setting, cost, num_rows, int(row.slots), gpus_per_host)
        prediction = predict(cost, chip, num_devices, hosts, traffic)
        fits = memory.peak <= (1 - headroom) * chip.memory_bytes
        estimated.append(Candidate(setting, memory, prediction, fits))
    return sorted(estimated, key=lambda setting: (not setting.fits, setting.prediction.step_time_s))


def settings(
    model: Model,
    num_devices: int,
    gpus_per_host: int,
    num_rows: int,
    seq_len: int,
    remats: Sequence[str],
) -> Iterator[Setting]:
    """Yield the settings that divide all array sizes, with `tensor` within one host."""
    arrays = {spec.path: (spec.axes, spec.shape(dict(model.axis_sizes))) for spec in model.specs}
    for sizes in _factorisations(num_devices, len(rules.AXES)):
        mesh: dict[str, int] = dict(zip(rules.AXES, sizes, strict=True))
        if gpus_per_host % mesh["tensor"] or rules.size_problems(arrays, mesh):
            continue
        for micro_rows in _divisors(num_rows):
            batch = {"micro-batch": (("batch", "residual"), (micro_rows, seq_len))}
            if not rules.size_problems(batch, mesh):
                yield from (Setting(mesh, micro_rows, remat) for remat in remats)


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        yield from ((first, *rest) for rest in _factorisations(number // first, parts - 1))


@functools.lru_cache(maxsize=1024)
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


# ---- memory ------------------------------------------------------------------------------------


def analytic_memory(model: Model, setting: Setting, num_rows: int, seq_len: int) -> Memory:
    """Estimate the bytes of one device at the peak of a step.

    Parameters, moments and gradients are exact, by rules.RULES. The rest is the activations that
    the policy keeps per layer and the working set of the largest phase. The estimate is within 10%
    of the compiled peak for 7B on 8 H200 (18 to 39 GiB), 32B on 8 and 72B on 64.
    """
    mesh, axis_sizes, tensor = setting.mesh, model.axis_sizes, setting.mesh["tensor"]
    local = _local_elements(model, mesh)
    tokens = setting.micro_rows * seq_len / (mesh["data"] * mesh["fsdp"] * mesh["sequence"])
    kept, computed = _elements_per_token(axis_sizes, setting.remat, tensor)
    layer = _matrix_elements(model, "layers") / axis_sizes["layers"] / tensor
    table = axis_sizes["vocab"] * axis_sizes["embed"] / tensor
    logits = min(HEAD_CHUNK, tokens) * axis_sizes["vocab"] / tensor
    gradients = SUM_BYTES * local
    accumulates = setting.micro_rows < num_rows  # the sum and the new gradients are both alive
    # The next layer is gathered while this one is computed, and a layer's gradients are formed
    # whole. The factor 1.3: not all activations of a layer are alive at once, but some are in
    # float32 and alive together with their gradient.
    trainable = _matrix_elements(model, "layers", trained=True) / axis_sizes["layers"] / tensor
    in_layer = 2 * COMPUTE_BYTES * layer + model.grad_bytes * trainable
    in_layer += 1.3 * COMPUTE_BYTES * computed * tokens
    table_bytes = COMPUTE_BYTES + (SUM_BYTES if _head_trains(model) else 0)
    in_head = table_bytes * table + (COMPUTE_BYTES + 2 * SUM_BYTES) * logits
    in_head += 2 * COMPUTE_BYTES * axis_sizes["embed"] * tokens
    in_head -= gradients  # this pass has no gradients yet
    return Memory(
        parameters=model.param_bytes * local + _frozen_bytes(model, mesh),
        moments=2 * model.moment_bytes * local,
        gradients=gradients * (2 if accumulates else 1),
        residuals=COMPUTE_BYTES * axis_sizes["layers"] * kept * tokens,
        workspace=max(in_layer, in_head),
    )


def _shards(spec: ParamSpec, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for logical in spec.axes for axis in rules.rule(logical))


def _matrix_elements(model: Model, prefix: str, trained: bool = False) -> int:
    return sum(
        math.prod(spec.shape(dict(model.axis_sizes)))
        for spec in model.specs
        if spec.is_matrix and spec.path.startswith(prefix + ".")
        if not (trained and spec.path in model.frozen)
    )


def _local_elements(model: Model, mesh: Mapping[str, int]) -> float:
    """Return the number of trainable elements on one device."""
    return sum(
        math.prod(spec.shape(dict(model.axis_sizes))) / _shards(spec, mesh)
        for spec in model.specs
        if spec.path not in model.frozen
    )


def _frozen_bytes(model: Model, mesh: Mapping[str, int]) -> float:
    return sum(
        math.prod(spec.shape(dict(model.axis_sizes)))
        / _shards(spec, mesh)
        * model.frozen[spec.path]
        for spec in model.specs
        if spec.path in model.frozen
    )


def _head_trains(model: Model) -> bool:
    return ("embed.table" if model.tied else "head.table") not in model.frozen


def _elements_per_token(
    axis_sizes: Mapping[str, int], remat: str, tensor: int
) -> tuple[float, float]:
    """Return the bfloat16 elements per token of a layer that (the policy keeps, it computes)."""
    features, mlp = axis_sizes["embed"], axis_sizes["mlp"] * axis_sizes.get("chosen", 1) / tensor
    q = axis_sizes["heads"] * axis_sizes["head_dim"] / tensor
    kv = 2 * axis_sizes["kv_heads"] * axis_sizes["head_dim"] / tensor
    lse = 2 * axis_sizes["heads"] / tensor  # float32
    # Between the blocks, tokens are sharded over `tensor`: x, the sum and two norms in float32.
    # Inside the blocks: two norms, q, k and v before and after rotation, the context and its lse,
    # the attention output; gate, up, silu(gate) and the product.
    computed = 6 * features / tensor + 3 * features + 3 * q + 2 * kv + lse + 4 * mlp
    computed += (
        3 * features * axis_sizes.get("chosen", 0)
    )  # the rows of experts: x, in blocks, and y
    if remat == "none":  # from compiled steps: float32 intermediates, named values twice
        return 2.5 * computed, computed
    kept = features / tensor  # a layer's input is always kept
    if remat == "dots":
        return kept + features + q + kv + 2 * mlp, computed
    again = recomputed(axis_sizes, remat)
    kept += q + kv if again["attention_projections"] < 1 else 0
    kept += q + lse if not again["attention_scores"] else 0
    kept += 2 * mlp if not again["mlp"] else 0
    return kept, computed


# ---- traffic -----------------------------------------------------------------------------------


def analytic_traffic(
    model: Model,
    setting: Setting,
    cost: StepCost,
    num_rows: int,
    seq_len: int,
    gpus_per_host: int,
) -> list[Traffic]:
    """Return the collectives of a well-compiled step.

    Gathers of layer weights and reductions of their gradients overlap with the layers' matrix
    products. Collectives of the head, of activations over `tensor` and of keys and values block.
    """
    mesh, axis_sizes = setting.mesh, model.axis_sizes
    micros = num_rows // setting.micro_rows
    num_layer_passes = micros * axis_sizes["layers"]
    passes = 2 if setting.remat in ("none", "dots") else 3  # over a layer's projections
    overlap_flops = sum(flops for part, flops in cost.hardware.items() if part != "head")
    overlap_flops /= math.prod(mesh.values())
    rows = setting.micro_rows / (mesh["data"] * mesh["fsdp"])
    layer = _matrix_elements(model, "layers") / axis_sizes["layers"] / mesh["tensor"]
    table = axis_sizes["vocab"] * axis_sizes["embed"] / mesh["tensor"]
    trainable = (
        _matrix_elements(model, "layers", trained=True) / axis_sizes["layers"] / mesh["tensor"]
    )
    local = _local_elements(model, mesh)
    x = rows * seq_len / mesh["sequence"] * axis_sizes["embed"]
    kv = rows * seq_len * 2 * axis_sizes["kv_heads"] * axis_sizes["head_dim"] / mesh["tensor"]

    def traffic(kind, axes, elements, size, count, hidden=0.0, blocking=False) -> Traffic:
        members, slow = _ring(tuple(mesh.items()), tuple(axes), gpus_per_host)
        sent = elements * size * count * (members - 1) / members
        sent *= 2 if kind == "all-reduce" else 1
        return Traffic(
            *(kind, tuple(axes), sent * (1 - slow), sent * slow, count, hidden, 0.0, blocking)
        )

    embed, tensor, sequence = rules.RULES["embed"], ("tensor",), ("sequence",)
    gather, scatter, reduce = "all-gather", "reduce-scatter", "all-reduce"
    transfers = [
        traffic(gather, embed, layer, COMPUTE_BYTES, 2 * num_layer_passes, overlap_flops),
        traffic(
            scatter, embed, trainable, model.grad_bytes, num_layer_passes, overlap_flops * 2 / 3
        ),
        traffic(reduce, ("data",), local, model.grad_bytes, micros, overlap_flops * 2 / 3),
        traffic(gather, embed, table, COMPUTE_BYTES, micros, blocking=True),  # the head
        traffic(scatter, embed, table * _head_trains(model), SUM_BYTES, micros, blocking=True),
        traffic("all-to-all", embed, x, COMPUTE_BYTES, 2 * micros, blocking=True),  # the lookup
        traffic(gather, tensor, x, COMPUTE_BYTES, 2 * passes * num_layer_passes, blocking=True),
        traffic(scatter, tensor, x, COMPUTE_BYTES, (2 + passes) * num_layer_passes, blocking=True),
        traffic(gather, sequence, kv, COMPUTE_BYTES, passes * num_layer_passes, blocking=True),
        traffic(scatter, sequence, kv, COMPUTE_BYTES, num_layer_passes, blocking=True),
    ]
    return [transfer for transfer in transfers if transfer.bytes_fast or transfer.bytes_slow]


@functools.lru_cache(maxsize=4096)
def _ring(
    mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...], gpus_per_host: int
) -> tuple[int, float]:
    """Return (devices of a group, share of the hops of its ring that leave a host).

    Devices are ordered as in `make_mesh`: `tensor` varies fastest, then `sequence`.
    """
    sizes, stride, offsets = dict(mesh), 1, [0]
    for axis in ("tensor", "sequence", "fsdp", "data"):
        size = sizes[axis]
        if axis in axes:
            offsets = [at + stride * n for at, n in itertools.product(offsets, range(size))]
        stride *= size
    hosts = len({offset // gpus_per_host for offset in offsets})
    return len(offsets), hosts / len(offsets) if hosts > 1 else 0.0
