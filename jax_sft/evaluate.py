"""Evaluation over whole validation sets, tail included, weighted by trained tokens."""

import math
from collections.abc import Callable, Mapping

import jax

from jax_sft.data.loader import Loader


def evaluate(eval_step: Callable, params: dict[str, jax.Array], sets: Mapping[str, Loader]) -> dict:
    """Return token-weighted loss, perplexity and next-token accuracy of each set and of all.

    Args:
        eval_step: from `step.make_eval_step`.
        sets: {name: loader without shuffling}.

    Returns:
        {"eval/NAME/loss": ..., "eval/NAME/perplexity": ..., "eval/NAME/accuracy": ...} and the
        same without NAME over all sets together.
    """
    metrics, totals = {}, []
    for name, loader in sets.items():
        sums = [eval_step(params, batch) for batch in loader.batches(0, loader.steps_per_epoch)]
        # Added on the host in float64: a float32 count stops growing at 16.8M tokens.
        total = [sum(float(s[key]) for s in sums) for key in ("loss", "weight", "correct")]
        totals.append(total)
        metrics |= _means(f"eval/{name}/", *total)
    if totals:
        metrics |= _means("eval/", *(sum(part) for part in zip(*totals, strict=True)))
    return metrics


def _means(prefix: str, loss: float, weight: float, correct: float) -> dict[str, float]:
    mean = loss / weight
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {
        prefix + "loss": mean,
        prefix + "perplexity": perplexity,
        prefix + "accuracy": correct / weight,
    }
