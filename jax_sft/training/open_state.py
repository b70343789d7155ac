"""Open the state of a run: its newest checkpoint, or the pretrained weights at step 0."""

import dataclasses
import functools

from jax_sft.adapters import freeze
from jax_sft.checkpoint import model_files, pretrained, same_weights, saving
from jax_sft.checkpoint.resume import StoredStep
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens import prepare
from jax_sft.files import paths
from jax_sft.runtime import command_line, lifecycle
from jax_sft.settings import Settings
from jax_sft.training import metrics, optim, state
from jax_sft.training.open_data import Data
from jax_sft.training.open_run import Run
from jax_sft.training.program import Program, objective
from jax_sft.training.step import ROUTER_AUX
from jax_sft.validate import Resolved
from jax_sft.weights import hf_folder, vocabulary


@dataclasses.dataclass(frozen=True)
class Start:
    """The step at which a run starts.

    Attributes:
        step: number of steps already done.
        skipped_steps: number of these steps that were not applied.
        owes_evaluation: whether to evaluate this step before training the next one.
    """

    step: int
    skipped_steps: int
    owes_evaluation: bool

    @classmethod
    def of(cls, stored: StoredStep | None, run: Run, data: Data) -> "Start":
        """Return the start at a stored step, or at step 0 if `stored` is None."""
        owes = stored.extra.get("owes_evaluation") if stored else run.settings.eval.at_start
        return cls(
            step=stored.step if stored else 0,
            skipped_steps=stored.extra.get("skipped_steps", 0) if stored else 0,
            owes_evaluation=bool(data.eval_loaders and owes),
        )


def open_checkpoints(run: Run, data: Data) -> tuple[saving.Checkpoints, StoredStep | None]:
    """Return the checkpoints of a run and the step to resume, without reading arrays.

    Raises:
        ValueError: the adapter belongs to another model, the folder cannot be used, or config or
            data have changed in a way that is not allowed.
    """
    settings, model, adapters = run.settings, run.model, run.settings.adapters
    run.watch.at("loading the weights")
    if run.is_first:
        lifecycle.keeps(run.workdir)
    adapter = paths.local(settings.lora.path, "lora.path") if settings.lora.path else None
    same_weights.check(model.folder, adapter, hf_folder.step_of(settings.model.path))
    checkpoints = saving.Checkpoints(
        run.workdir / "checkpoints",
        settings.checkpoint,
        model=model_files.Model(
            model.folder, model.weights.dtypes, prepare.options(settings.data).chat_template
        ),
        data=prepare.fingerprint(data.train),
        eval_data={name: prepare.fingerprint(examples) for name, examples in data.eval.items()},
        bound=bound_keys(settings),
        adapters=dataclasses.asdict(adapters) if adapters else None,
        vocabulary=vocabulary.Vocabulary.of(model.specs, run.settings.model_cfg.vocab),
        turn_ends=data.turn_ends,
        guard=run.lock.check if run.lock else None,
        say=run.say,
    )
    return checkpoints, checkpoints.start(run.config)


def bound_keys(settings: Resolved) -> tuple[str, ...]:
    """Return the free keys (`settings.Key`) that change the losses of this run.

    Dropout and the balance of experts act within each micro-batch, so they depend on its rows.
    """
    drops = settings.adapters is not None and settings.adapters.dropout > 0
    balances = objective(settings.loss, settings.model_cfg).get(ROUTER_AUX)
    return ("batch.micro_rows",) if drops or balances else ()


def restore_or_load(
    run: Run,
    data: Data,
    program: Program,
    checkpoints: saving.Checkpoints,
    stored: StoredStep | None,
) -> tuple[state.TrainState, Start]:
    """Return the first state of a run, from a stored step or from the pretrained weights.

    Args:
        stored: step to resume; if its arrays are damaged, an older step is used. None = start from
            the pretrained weights.

    Raises:
        ValueError: no step can be read, or the weights in the model folder have changed since the
            run began.
    """
    model_def, specs = program.model_def, run.model.specs
    adapters = run.settings.adapters
    if model_def.frozen_dtypes or model_def.layer_masks:
        trained = "adapters" if adapters else "what train.freeze leaves"
        run.say(f"trains  {trained}: {metrics.count(freeze.count(model_def))} parameters")
    read = functools.partial(
        pretrained.read,
        run.model.weights,
        model_def,
        mesh=run.mesh,
        dtype=run.settings.model.param_dtype,
        progress=run.is_first,
    )
    if stored:
        arrays, stored = checkpoints.restore(stored, program.state.named())
        first = program.state.from_named(stored.step, arrays)
        run.say(f"resume  {run.workdir} from step {stored.step} of {data.num_steps}")
        # A stored step has only the trainable weights: read the frozen ones from the model folder.
        frozen = [spec.path for spec in specs if spec.path not in program.state.params]
        first = dataclasses.replace(first, frozen=read(frozen))
    else:
        weights = read([spec.path for spec in specs])
        if adapters:
            weights |= freeze.adapters(
                *(adapters, model_def, weights, run.mesh),
                path=run.settings.lora.path,
                seed=run.settings.seed,
                dtype=run.settings.model.param_dtype,
            )
        first = state.create(
            program.tx, weights, model_def.stored_specs, run.mesh, model_def.frozen_dtypes
        )
    checkpoints.keep_frozen(first.frozen, stored)
    return first, Start.of(stored, run, data)


def how_to_train_on(settings: Settings, start: int, loader: Loader) -> str:
    """Return advice on how to continue training a run that has done all its steps."""
    key = "train.steps" if settings.train.steps else "train.epochs"
    value: float = settings.train.steps or settings.train.epochs
    while (num_steps := value if settings.train.steps else loader.num_steps(value)) <= start:
        value = 2 * value
    rate = [
        float(optim.learning_rate(optim.hyperparams(settings.optimizer, steps), start))
        for steps in (start, int(num_steps))
    ]
    allowed = tuple(dict.fromkeys((*settings.checkpoint.allow_changes, key)))
    return (
        f"nothing was trained or written. To train up to step {num_steps:.0f} (the learning rate "
        f"goes from {rate[0]:.2g} back to {rate[1]:.2g}): "
        + command_line.again({key: f"{value:g}", "checkpoint.allow_changes": allowed})
    )
