"""Analyze a config on a target: everything in plan.json. Called by `plan` and `search`."""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_sft.hardware import Chip
from jax_sft.ops import cross_entropy, grouped
from jax_sft.ops.attention import blockwise, cudnn
from jax_sft.ops.head_chunks import chunk_sizes, num_chunks
from jax_sft.planning import step_cost
from jax_sft.planning.compiling import Compiled, compile_step, shard_bytes
from jax_sft.planning.hlo import collectives, device_groups, kernels, loops, parser
from jax_sft.planning.roofline import Prediction, Traffic, predict
from jax_sft.report.plan_tables import Plan
from jax_sft.sharding.collectives import INTERLEAVED_TOKENS
from jax_sft.sharding.mesh import GPU_MEMORY
from jax_sft.validate import Resolved

LARGE_BYTES = 64 * 2**20  # a replicated array or a float32 product of this size is worth a warning
IMBALANCE = 1.2  # attention work over the shards of `sequence`: maximum / mean


@dataclasses.dataclass(frozen=True)
class Target:
    """The hardware a run is planned for, and the work of its mean row."""

    chip: Chip
    hosts: int
    gpus_per_host: int
    devices: Sequence[Any]
    row: step_cost.RowWork

    @property
    def num_devices(self) -> int:
        return self.hosts * self.gpus_per_host


def analyse(settings: Resolved, target: Target, hlo_file: Path | None = None) -> Plan:
    """Compile the step and return the plan as a dict (see `plan_tables.Plan`)."""
    compiled = compile_step(settings, target.devices)
    if hlo_file:
        hlo_file.write_text(compiled.text)
    module = parser.parse(compiled.text)
    platform = "gpu" if compiled.for_gpus else "cpu"
    executions = loops.executions(module, _Loops(settings, target.row, platform))
    step_collectives = collectives.collectives(module, executions)
    gemms = kernels.gemms(module, executions)
    mesh = compiled.program.mesh
    table = [_row(c, mesh, target) for c in step_collectives if c.group_size > 1]
    cost = _cost(settings, compiled, target)
    plan: Any = {
        "target": {
            "chip": target.chip.name,
            "hosts": target.hosts,
            "gpus_per_host": target.gpus_per_host,
            "num_devices": target.num_devices,
        },
        "versions": {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")},
        "compiled_for": "cuda" if compiled.for_gpus else "cpu (partitioned table only)",
        "config": _config(settings),
        "compile": {
            "lower_s": compiled.lower_s,
            "compile_s": compiled.compile_s,
            "hlo_bytes": len(compiled.text),
        },
        "communication": table,
        "communication_total": {
            "fast_bytes": sum(row["fast_bytes"] for row in table),
            "slow_bytes": sum(row["slow_bytes"] for row in table),
        },
        "arithmetic": {
            "model_flops": cost.model,
            "hardware_flops": sum(cost.hardware.values()),
            "compiled_gemm_flops": sum(gemm.step_flops for gemm in gemms) * target.num_devices,
        },
        "row": dataclasses.asdict(target.row),
        "opaque_kernels": {},  # {custom call target: count}, not in compiled_gemm_flops
        "warnings": _warnings(settings, compiled, module, step_collectives, gemms),
        "advice": [],
    }
    for call in kernels.opaque_calls(module, executions):
        plan["opaque_kernels"][call.target] = (
            plan["opaque_kernels"].get(call.target, 0) + call.count
        )
    if compiled.for_gpus:
        traffic = [_traffic(row) for row in table]
        hosts = target.hosts
        chip = target.chip
        if settings.model.dtype == "float32":  # TF32 runs at half of bfloat16's rate
            chip = dataclasses.replace(chip, peak_flops=chip.peak_flops / 2)
        prediction = predict(cost, chip, target.num_devices, hosts, traffic)
        workspace = _workspace(settings)
        plan["memory"] = _memory(compiled, target.chip, module, workspace)
        plan["predicted"] = _predicted(prediction)
    return plan


# ---- parts -------------------------------------------------------------------------------------


class _Loops:
    """Expected trip counts of the loops whose trip count depends on the data."""

    def __init__(self, settings: Resolved, row: step_cost.RowWork, platform: str):
        self._row, self._sizes, self._platform = row, settings.mesh_shape, platform
        ranks = self._sizes["data"] * self._sizes["fsdp"]
        self._tokens = (
            settings.micro_rows // ranks * settings.data.seq_len // self._sizes["sequence"]
        )
        self._vocab = -(-settings.model_cfg.vocab // self._sizes["tensor"])

    def __call__(self, loop: parser.Instruction) -> float:
        if size := re.search(rf"{cross_entropy.LOOP}_(\d+)", loop.op_name):
            trained = math.ceil(self._tokens * self._row.trained / self._row.slots)
            sizes = chunk_sizes(self._vocab, self._tokens, self._platform)
            return num_chunks(trained, sizes)[sizes.index(int(size[1]))]
        if blockwise.LOOP in loop.op_name:
            # Forward: each query block visits the key blocks that hold its visible pairs.
            # Backward: each key block visits the query blocks of this device.
            needed = self._row.pairs / self._row.slots / blockwise.BLOCK
            is_backward = "transpose(" in loop.op_name and "rematted" not in loop.op_name
            return max(needed / (self._sizes["sequence"] if is_backward else 1), 1.0)
        if grouped.LOOP in loop.op_name:
            return grouped.BLOCKS * step_cost.LARGEST_GROUP
        raise ValueError(
            f"{loop.name} ({loop.op_name}) has a data-dependent trip count and no estimate: "
            "add one to _Loops"
        )


def _row(collective: collectives.Collective, mesh, target: Target) -> dict:
    """Return one row of the communication table: a collective over a whole step."""
    # The compiler numbers devices by position in the mesh; links depend on the physical ids.
    numbers = [device.id for device in mesh.devices.flat]
    physical = dataclasses.replace(
        collective,
        groups=tuple(tuple(numbers[place] for place in group) for group in collective.groups),
        pairs=tuple((numbers[a], numbers[b]) for a, b in collective.pairs),
    )
    slow = physical.slow_share(target.gpus_per_host)
    # In a module partitioned for CPUs, a reduce-scatter is still a sliced all-reduce.
    kind, sent = collective.kind, collective.step_wire_bytes
    if collective.sliced:
        kind, sent = "reduce-scatter", sent / 2
    return {
        "kind": kind,
        "axis": list(device_groups.axis_of(collective.groups, mesh.shape)),
        "dtype": "+".join(collective.dtypes),
        "bytes": collective.result_bytes,
        "count": collective.count,
        "fast_bytes": sent * (1 - slow),
        "slow_bytes": sent * slow,
        "overlaps": None if collective.blocking is None else not collective.exposed,
        "hidden_behind_flops": collective.overlap.flops * collective.count,
        "hidden_behind_bytes": collective.overlap.bytes * collective.count,
        "arrays": [f"{array.dtype}{list(array.dims)}" for array in collective.arrays],
        "what": _label(collective.op_name),
    }


def _label(op_name: str) -> str:
    """Return the last part.* scope of an op_name, and whether it is backward or recomputed."""
    scopes = re.findall(r"part\.([\w.]+)", op_name)
    if not scopes:
        return op_name.rsplit("/", 1)[-1]
    # Checked first: the op_names of recomputed values contain "transpose(" too.
    if "rematted_computation" in op_name:
        return f"{scopes[-1]}, again"
    return f"{scopes[-1]}, backward" if "transpose(" in op_name else scopes[-1]


def _traffic(row: Mapping[str, Any]) -> Traffic:
    return Traffic(
        kind=row["kind"],
        axis=tuple(row["axis"]),
        bytes_fast=row["fast_bytes"],
        bytes_slow=row["slow_bytes"],
        count=row["count"],
        hidden_behind_flops=row["hidden_behind_flops"],
        hidden_behind_bytes=row["hidden_behind_bytes"],
        blocking=not row["overlaps"],
    )


def _cost(settings: Resolved, compiled: Compiled, target: Target) -> step_cost.StepCost:
    model_def = compiled.program.model_def
    return step_cost.step_cost(
        model_def.specs,
        model_def.axis_sizes,
        settings.model_cfg.tied,
        target.row,
        num_rows=settings.batch.rows,
        micro_batches=settings.batch.rows // settings.micro_rows,
        remat=settings.model.remat,
        attention=settings.attention,
        sizes=settings.mesh_shape,
        offload=settings.model.offload,
        param_bytes=jax.numpy.dtype(settings.model.param_dtype).itemsize,
        moment_bytes=jax.numpy.dtype(settings.optimizer.moments_dtype).itemsize,
        frozen=model_def.frozen_bytes,
    )


def _workspace(settings: Resolved) -> int:
    """Return the attention kernel's workspace bytes, which compiling without a GPU omits."""
    if settings.attention != "cudnn":
        return 0
    sizes, axis_sizes = settings.mesh_shape, settings.model_cfg.axis_sizes
    return cudnn.workspace_bytes(
        rows=settings.micro_rows // (sizes["data"] * sizes["fsdp"]),
        num_tokens=settings.data.seq_len,
        num_heads=axis_sizes["heads"] // sizes["tensor"],
        num_kv_heads=axis_sizes["kv_heads"] // sizes["tensor"],
        head_dim=axis_sizes["head_dim"],
        max_segments=settings.data.max_segments,
    )


def _memory(compiled: Compiled, chip: Chip, module: parser.Module, workspace: int) -> dict:
    state = compiled.program.state
    parameters = sum(map(shard_bytes, state.weights.values()))
    moments = sum(map(shard_bytes, jax.tree.leaves(state.opt_state)))
    gradients = sum(
        shard_bytes(jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding))
        for p in state.params.values()
    )
    headroom = round((1 - GPU_MEMORY) * chip.memory_bytes)
    memory = compiled.memory
    peak = memory["peak"] + workspace
    return {
        "parameters": parameters,
        "moments": moments,
        "gradients": gradients,
        "activations_and_temporaries": peak - memory["arguments"] - gradients,
        "attention_workspace": workspace,
        "arguments": memory["arguments"],
        "temporaries": memory["temporaries"],
        "host_bytes": memory["host"],
        "peak_bytes": peak,
        "card_bytes": chip.memory_bytes,
        "headroom_bytes": headroom,
        "fits": peak + headroom <= chip.memory_bytes,
        "largest": [_buffer(buffer) for buffer in kernels.buffers(module, 2**20)[:12]],
    }


def _buffer(buffer: kernels.Buffer) -> dict:
    shape = f"{buffer.dtype}{list(buffer.dims)}"
    return {
        "bytes": buffer.bytes,
        "shape": shape,
        "what": _label(buffer.op_name),
        "count": buffer.count,
    }


def _config(settings: Resolved) -> dict:
    return {
        "model": settings.model.path,
        "mesh": settings.mesh_shape,
        "rows": settings.batch.rows,
        "micro_rows": settings.micro_rows,
        "seq_len": settings.data.seq_len,
        "remat": settings.model.remat,
        "offload": list(settings.model.offload),
        "attention": settings.attention,
        "dtype": settings.model.dtype,
        "param_dtype": settings.model.param_dtype,
        "grad_dtype": settings.model.grad_dtype,
        "moments_dtype": settings.optimizer.moments_dtype,
    }


def _predicted(prediction: Prediction) -> dict:
    fields = dataclasses.asdict(prediction)
    return fields | {"assumptions": list(prediction.assumptions)}


# ---- warnings ----------------------------------------------------------------------------------


def _warnings(
    settings: Resolved,
    compiled: Compiled,
    module: parser.Module,
    ops: Sequence[collectives.Collective],
    gemms: Sequence[kernels.Gemm],
) -> list[str]:
    """Return the problems and inefficiencies of the compiled step, one sentence each."""
    sizes, axis_sizes = settings.mesh_shape, settings.model_cfg.axis_sizes
    lines = []
    if compiled.for_gpus and settings.attention in ("blockwise", "reference"):
        lines.append(
            f"attention is {settings.attention!r}, no flash kernel: many times slower. With "
            "mesh.sequence above 1 install tokamax, else see model.attention"
        )
    lines += [f"involuntary full rematerialisation: {line}" for line in compiled.involuntary]
    # The threshold is the smallest trainable matrix of a layer. Norms, biases and adapters are
    # smaller and may be all-reduced. Routers are left out because they are as small.
    trainable = [
        spec
        for spec in settings.family.weights(settings.model_cfg)
        if spec.is_matrix and spec.path not in compiled.program.model_def.frozen_bytes
        if "experts" in spec.stacked or "experts" not in spec.axes
    ]
    layer_sizes = [
        math.prod(axis_sizes[axis] for axis in spec.axes if axis != "layers") for spec in trainable
    ]
    for op in collectives.gradient_all_reduces(
        ops,
        sizes,
        min(layer_sizes, default=2**62) // sizes["tensor"] // 2,
        allowed=(("data",), ("tensor",)),
    ):
        if op.sliced:
            continue
        axes = " x ".join(device_groups.axis_of(op.groups, sizes))
        lines.append(f"all-reduce of a gradient over {axes}: {op.arrays[0]} ({op.op_name})")
    lines += _replicated(compiled, sizes)
    if settings.model.dtype != "float32":
        for op in gemms:
            if op.is_float32 and min(op.m * op.k, op.k * op.n) * 4 >= LARGE_BYTES:
                lines.append(f"float32 product [{op.m} x {op.k} x {op.n}]: {op.op_name}")
    seq_len, vocab = settings.data.seq_len, -(-axis_sizes["vocab"] // sizes["tensor"])
    local = seq_len // sizes["sequence"]
    heads = axis_sizes["heads"] // sizes["tensor"]
    for name, shape, least in (
        ("scores of all pairs of a row", (local, seq_len), heads * local * seq_len),
        ("logits of all tokens of a row", (local, vocab), 2 * local * vocab),
    ):
        if big := kernels.with_dims(module, shape, least):
            lines.append(f"{name} are held at once: {big[0].dtype}{list(big[0].dims)}")
    uneven = imbalance(seq_len, sizes["sequence"])
    if uneven > IMBALANCE:
        lines.append(
            f"attention of one full segment is {uneven:.2f} times the mean on the busiest shard of "
            f"mesh.sequence: its interleaved chunks are too few, use a longer data.seq_len"
        )
    return lines


def _replicated(compiled: Compiled, sizes: Mapping[str, int]) -> list[str]:
    """Return a warning for each large array of the state that could be sharded but is not."""
    shards = sizes["fsdp"] * sizes["tensor"] * sizes["sequence"]
    lines = []
    for path, array in compiled.program.state.weights.items():
        whole = math.prod(array.shape) * array.dtype.itemsize
        if shards > 1 and whole >= LARGE_BYTES and shard_bytes(array) == whole:
            lines.append(f"{path} ({whole / 2**30:.2f} GiB) is held whole by every device")
    return lines


def imbalance(seq_len: int, shards: int) -> float:
    """Return max / mean attention work over the shards of a row that is one segment."""
    if shards == 1:
        return 1.0
    chunk = math.gcd(INTERLEAVED_TOKENS, seq_len // shards)
    work = np.arange(1, seq_len + 1).reshape(-1, shards, chunk).sum((0, 2))
    return float(work.max() / work.mean())
