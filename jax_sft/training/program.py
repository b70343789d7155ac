"""Build the compiled program of a run from its settings. `train` runs it, `plan` only compiles it.

Everything that decides what the devices do is put together in this module only, so that a plan
describes exactly the step that will run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_sft.adapters import freeze
from jax_sft.batch import Batch, empty_rows
from jax_sft.nn.model_def import ModelDef
from jax_sft.settings import Loss
from jax_sft.training import optim, state
from jax_sft.training.state import TrainState
from jax_sft.training.step import (
    ROUTER_AUX,
    Scalars,
    Sums,
    TrainStep,
    batch_shardings,
    make_eval_step,
    make_train_step,
)
from jax_sft.validate import Resolved

# XLA's compiler options on CPUs. The update reads each moment twice: for the parameter and for the
# moment itself. Without this option XLA first copies all moments, so that one of the two does not
# overwrite a value that the other has yet to read.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled steps of a run, with their model, optimizer and argument shapes.

    Attributes:
        model_def: the model.
        mesh: all devices.
        tx: the optimizer.
        state: TrainState of ShapeDtypeStructs with shardings.
        batch: a batch of ShapeDtypeStructs with shardings, [micro-batches, rows, seq_len].
        scalars: numbers of this run, on the host, for `train_step`.
        train_step: jitted `step(state, batch, scalars) -> (state, sums)`.
        eval_step: jitted `step(params, batch, before) -> sums`.
    """

    model_def: ModelDef
    mesh: Mesh
    tx: optax.GradientTransformationExtraArgs
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    scalars: Scalars
    train_step: TrainStep
    eval_step: Callable[[dict[str, jax.Array], Batch, Sums], Sums]


def model_def(settings: Resolved) -> ModelDef:
    """Return the model, with its computation and trainable weights as configured."""
    plain = ModelDef.of(
        settings.family,
        settings.model_cfg,
        dtype=settings.model.dtype,
        grad_dtype=settings.model.grad_dtype,
        attention=settings.attention,
        max_segments=settings.data.max_segments,
        remat=settings.model.remat,
        offload=settings.model.offload,
        vocab_shards=settings.mesh_shape["tensor"],
    )
    return freeze.choose(plain, settings.adapters, settings.train.freeze)


def program(settings: Resolved, mesh: Mesh, num_steps: int, num_sources: int = 0) -> Program:
    """Build the program of a run without allocating or compiling anything.

    Args:
        num_steps: steps of the whole run, for the schedule in `Program.scalars`.
        num_sources: number of train sources whose losses are logged; 0 = none.
    """
    model = model_def(settings)
    tx = optim.make(settings.optimizer.moments_dtype, model.trainable_specs)
    dtype = jnp.dtype(settings.model.param_dtype)
    abstract = state.abstract(
        tx, model.stored_specs, model.axis_sizes, dtype, mesh, model.frozen_dtypes
    )
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = CPU_OPTIONS if on_cpu else gpu_options(settings.attention)
    terms = objective(settings.loss, settings.model_cfg)
    return Program(
        model_def=model,
        mesh=mesh,
        tx=tx,
        state=abstract,
        batch=_abstract_batch(settings, mesh, per_source=num_sources > 0),
        scalars=Scalars(
            optimizer=optim.hyperparams(settings.optimizer, num_steps),
            router_aux=np.float32(terms[ROUTER_AUX]),
            dropout_key=_dropout_key(settings.seed) if model.with_dropout else None,
        ),
        train_step=make_train_step(
            model,
            tx,
            shardings,
            mesh,
            num_sources=num_sources,
            objective=terms,
            compiler_options=options,
        ),
        eval_step=make_eval_step(model, mesh, options),
    )


def _dropout_key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def objective(loss: Loss, model_cfg: Any) -> dict[str, float]:
    """Return the `objective` of the step: `loss` with the weight of the experts' balance loss.

    A negative router_aux means the value of the model's config.
    """
    terms = dataclasses.asdict(loss)
    if loss.router_aux < 0:
        terms["router_aux"] = model_cfg.router_aux if "experts" in model_cfg.axis_sizes else 0.0
    return terms


def gpu_options(attention: str) -> dict[str, Any]:
    """Return XLA's compiler options on GPUs, for training and plans alike.

    The latency-hiding scheduler, which newer versions of JAX enable by default, overlaps the
    gathers of weights with the products before them. Sums keep one order (no atomics), so that the
    same config gives bitwise the same losses. The exception is cuDNN's attention, whose backward
    pass would then need memory quadratic in the length of a row. Only model.remat decides what is
    recomputed. XLA's own pass, which starts when memory is short, is disabled: it computes a fusion
    of several results once for each of them (7B on one H200: 60 ms of a step, no byte saved).
    """
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_exclude_nondeterministic_ops": attention != "cudnn",
        "xla_disable_hlo_passes": "rematerialization",
    }


def _abstract_batch(settings: Resolved, mesh: Mesh, per_source: bool) -> dict[str, Any]:
    """Return the shapes, dtypes and shardings of a global batch of packed rows."""
    micro_batches = settings.batch.rows // settings.micro_rows
    shape = (micro_batches, settings.micro_rows, settings.data.seq_len)
    row = empty_rows(1, 1, per_source)
    return {
        name: jax.ShapeDtypeStruct(shape, row[name].dtype, sharding=sharding)
        for name, sharding in batch_shardings(mesh, per_source).items()
    }
