"""Evaluate on whole validation sets, tail included, weighted by trained tokens."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jax_sft.data.batches.examples import Example, Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens.detokenize import Detokenizer
from jax_sft.inference import LoadedModel
from jax_sft.training.step import no_sums


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates the weights of a run: a call with {path: array} returns the metrics.

    Attributes:
        eval_step: see `evaluate`.
        loaders: {name of a set: loader without shuffling}.
        tick: see `evaluate`.
        examples: {name of a set: its examples}; the model answers the first ones.
        num_samples: number of examples to answer in each set.
        stop_ids: token ids that end an answer, see `answers`.
        answerer: model that answers; None = no answers.
        detokenizer: decodes the answers; None = no answers.
        say: prints a line.
    """

    eval_step: Callable
    loaders: Mapping[str, Loader]
    tick: Callable[[], None]
    examples: Mapping[str, Examples]
    num_samples: int
    stop_ids: Sequence[int]
    answerer: LoadedModel | None
    detokenizer: Detokenizer | None
    say: Callable[[str], None]

    def __call__(self, weights: dict[str, jax.Array]) -> dict[str, float]:
        metrics = evaluate(self.eval_step, weights, self.loaders, self.tick)
        if self.answerer and self.detokenizer:
            self.answerer.params = weights
            metrics |= answers(
                self.answerer,
                self.detokenizer,
                self.examples,
                self.num_samples,
                self.stop_ids,
                self.say,
            )
        return metrics


def evaluate(
    eval_step: Callable,
    params: dict[str, jax.Array],
    sets: Mapping[str, Loader],
    tick: Callable[[], None] = lambda: None,
) -> dict:
    """Return token-weighted loss, perplexity and next-token accuracy of each set and overall.

    Args:
        eval_step: from `step.make_eval_step`.
        sets: {name: loader without shuffling}.
        tick: called before each batch; an exception that it raises ends the evaluation.

    Returns:
        {"eval/NAME/loss": ..., "eval/NAME/perplexity": ..., "eval/NAME/accuracy": ...} and the
        same without NAME over all sets together.
    """
    metrics, totals = {}, []
    for name, loader in sets.items():
        sums, before = [], no_sums()
        for batch in loader.batches(0, loader.steps_per_epoch):
            tick()
            batch_sums = eval_step(params, batch, before)
            # Read the previous sums while the devices compute these. The devices never wait, no
            # batches queue up on them, and `tick` reflects their real progress.
            sums.append(jax.device_get(before))
            before = batch_sums
        sums.append(jax.device_get(before))
        # Add on the host in float64: a float32 count stops growing at 16.8M tokens.
        total = [sum(float(s[key]) for s in sums) for key in ("loss", "weight", "correct")]
        totals.append(total)
        metrics |= _means(f"eval/{name}/", *total)
    if totals:
        metrics |= _means("eval/", *(sum(part) for part in zip(*totals, strict=True)))
    return metrics


def _means(prefix: str, loss: float, weight: float, correct: float) -> dict[str, float]:
    mean = loss / weight
    if not math.isfinite(mean):
        raise FloatingPointError(f"{prefix}loss is {mean}: the model or the data is broken")
    return {
        prefix + "loss": mean,
        prefix + "perplexity": math.exp(min(mean, 700.0)),  # JSON has no infinity
        prefix + "accuracy": correct / weight,
    }


def answers(
    model: LoadedModel,
    tokenizer,
    sets: Mapping[str, Examples],
    num_samples: int,
    stop_ids: Sequence[int],
    say: Callable,
) -> dict[str, float]:
    """Answer the first `num_samples` examples of each set greedily and show them.

    Args:
        stop_ids: token ids at which generation with the exported model will stop. The last token
            of a reference counts as a stop token only if it is in `stop_ids`.

    Returns:
        {"eval/NAME/exact_match": share of answers that stop and equal the reference in every
        character}.
    """
    metrics = {}
    for name, examples in sets.items():
        samples = [examples[i] for i in range(min(num_samples, len(examples)))]
        prompts, references = zip(*(first_turn(sample) for sample in samples), strict=True)
        references = [ids[:-1] if ids[-1] in stop_ids else ids for ids in references]
        max_tokens = 1 + max(len(reference) for reference in references)  # 1 for the stop token
        replies = model.greedy(prompts, max_tokens, stop_ids)
        num_right = 0
        for prompt, reference, answer in zip(prompts, references, replies, strict=True):
            texts = [tokenizer.decode(ids) for ids in (prompt, reference, answer)]
            stopped = len(answer) < max_tokens  # `greedy` leaves out the stop token
            num_right += stopped and texts[1] == texts[2]
            end = "" if stopped else " and does not stop"
            say(f"  {name}: ...{texts[0][-60:]!r} -> {texts[2]!r}{end} (reference {texts[1]!r})")
        metrics[f"eval/{name}/exact_match"] = num_right / len(samples)
    return metrics


def first_turn(example: Example) -> tuple[list[int], list[int]]:
    """Return (prompt, answer with its end-of-turn token) of an example's first trained turn."""
    trained = example.weights > 0
    start = int(np.argmax(trained))
    stop = start + int(np.argmin(np.append(trained[start:], False)))
    return example.tokens[: start + 1].tolist(), example.targets[start:stop].tolist()


def line(metrics: Mapping[str, float]) -> str:
    """Return the metrics as one line for the screen."""
    return " | ".join(f"{name} {value:.4f}" for name, value in metrics.items())
