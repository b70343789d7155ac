"""The compiled program of a run, from its config: `train` feeds it, `plan` only compiles it.

Whatever decides what the devices do is put together here and nowhere else, so that a plan is of
the very step that will run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_sft.adapters import freeze
from jax_sft.batch import Batch, empty_rows
from jax_sft.nn.model_def import ModelDef
from jax_sft.training import optim, state
from jax_sft.training.state import TrainState
from jax_sft.training.step import Sums, batch_shardings, make_eval_step, make_train_step
from jax_sft.validate import Resolved

# What XLA is told on CPUs. The update reads each moment twice, for the parameter and for itself:
# without this XLA copies all moments first, lest one overwrites what the other has yet to read.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step and what belongs to it.

    Attributes:
        model_def: the model.
        mesh: all devices.
        tx: the optimizer.
        state: TrainState of ShapeDtypeStructs with shardings.
        batch: a batch of ShapeDtypeStructs with shardings, [micro-batches, rows, seq_len].
        train_step: jitted `step(state, batch) -> (state, sums)`.
        eval_step: jitted `step(params, batch, before) -> sums`.
    """

    model_def: ModelDef
    mesh: Mesh
    tx: optax.GradientTransformation
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]]
    eval_step: Callable[[dict[str, jax.Array], Batch, Sums], Sums]


def model_def(cfg, resolved: Resolved) -> ModelDef:
    """Return the model as the config wants it computed and trained."""
    plain = ModelDef.of(
        resolved.family,
        resolved.model_cfg,
        dtype=cfg.model.dtype,
        grad_dtype=cfg.model.grad_dtype,
        attention=resolved.attention,
        max_segments=cfg.data.max_segments,
        remat=cfg.model.remat,
        offload=cfg.model.offload,
        vocab_shards=resolved.mesh_shape["tensor"],
    )
    return freeze.choose(plain, resolved.adapters, cfg.train.freeze)


def program(cfg, resolved: Resolved, mesh: Mesh, num_steps: int, num_sources: int = 0) -> Program:
    """Put a run's program together; nothing is allocated or compiled.

    Args:
        num_steps: of the whole run, for the schedule.
        num_sources: train sources whose loss is asked for, 0 = none.
    """
    model = model_def(cfg, resolved)
    tx = optim.make(cfg.optimizer, num_steps, model.moving)
    dtype = jnp.dtype(cfg.model.param_dtype)
    abstract = state.abstract(tx, model.stored, model.dims, dtype, mesh, model.frozen)
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = CPU_OPTIONS if on_cpu else gpu_options(resolved.attention)
    return Program(
        model_def=model,
        mesh=mesh,
        tx=tx,
        state=abstract,
        batch=_abstract_batch(cfg, resolved, mesh, per_source=num_sources > 0),
        train_step=make_train_step(
            model,
            tx,
            optim.schedule(cfg.optimizer, num_steps),
            shardings,
            mesh,
            num_sources=num_sources,
            objective=objective(cfg.loss, resolved.model_cfg),
            compiler_options=options,
            seed=cfg.seed,
        ),
        eval_step=make_eval_step(model, mesh, options),
    )


def objective(loss, model_cfg) -> dict[str, float]:
    """Return the `objective` of the step: cfg.loss, with the weight of the balance of experts."""
    found = dict(loss)
    if loss.router_aux < 0:
        found["router_aux"] = model_cfg.router_aux if "experts" in model_cfg.dims else 0.0
    return found


def gpu_options(attention: str) -> dict[str, Any]:
    """Return what XLA is told on GPUs, in training and in plans alike.

    The latency-hiding scheduler, which newer versions of JAX have by default, moves the gathers of
    weights behind the products before them. Sums are kept in one order (no atomics), so that the
    same config gives bitwise the same losses: but not with cuDNN's attention, whose backward pass
    would then take memory quadratic in the length of a row. What is computed again is what
    model.remat says: XLA's own pass, which starts when memory gets short, computes a fusion of
    several results once for each of them (7B on one H200: 60 ms of a step, and no byte saved).
    """
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_exclude_nondeterministic_ops": attention != "cudnn",
        "xla_disable_hlo_passes": "rematerialization",
    }


def _abstract_batch(cfg, resolved: Resolved, mesh: Mesh, per_source: bool) -> dict[str, Any]:
    """The shapes of a global batch of packed rows."""
    micro_batches = cfg.batch.rows // resolved.micro_rows
    shape = (micro_batches, resolved.micro_rows, cfg.data.seq_len)
    row = empty_rows(1, 1, per_source)
    return {
        name: jax.ShapeDtypeStruct(shape, row[name].dtype, sharding=sharding)
        for name, sharding in batch_shardings(mesh, per_source).items()
    }
