"""Run our own trainer as a user does: `jax_sft.train` with a config, timed by its own metrics."""

import contextlib
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from jax_sft.runtime import huge_pages

if __name__ == "__main__":
    huge_pages.use(__file__)  # as the command does

import jax
import numpy as np

import jax_sft
from jax_sft import config
from jax_sft.runtime import command_line
from scripts.peers import contract


def main() -> None:
    command_line.leave_torch_out()  # as the command does
    spec = contract.read()
    workdir = Path(spec.workdir)
    lines = Lines(spec.started, to=sys.stdout)
    with contextlib.redirect_stdout(lines):
        last = jax_sft.train(run_config(spec), workdir)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if "step_time_s" in entry]
    timed = steps[spec.warmup :]
    tokens, trained = (
        [round(entry[name] * entry["step_time_s"]) for entry in timed]
        for name in ("tokens_per_s", "trained_tokens_per_s")
    )
    assert (tokens, trained) == contract.counts(spec), "the trainer saw other rows"
    contract.report(
        how=f"jax_sft.train, {lines.attention} attention, "
        + ", ".join(f"{key}={value}" for key, value in spec.ours["changes"].items())
        + ", huge pages" * huge_pages.in_use(),
        packages=["jax", "flax", "optax"],
        step_s=[entry["step_time_s"] for entry in timed],
        losses=[entry["loss"] for entry in steps],
        tokens=tokens,
        trained=trained,
        first_step_s=lines.first_step_s,
        peak_bytes=peak_bytes(lines),
        held_out_before=held_out_loss(spec),
        held_out_after=last["eval/loss"] if spec.held_out else None,
    )


def run_config(spec: contract.Spec) -> Any:
    """Return the config of this run."""
    cfg = config.default()
    cfg.model.path = spec.model
    cfg.model.dtype = spec.dtype
    cfg.data.train.main = config.source(spec.ours["data"], **spec.ours["source"])
    if spec.held_out:
        cfg.data.eval.held_out = config.source(spec.held_out, format="tokens")
    cfg.data.seq_len = spec.seq_len
    cfg.data.cache_dir = spec.ours["cache_dir"]
    cfg.batch.rows = spec.ours["rows"]
    cfg.train.steps = spec.steps
    cfg.optimizer.schedule = "constant"
    cfg.optimizer.warmup = 0.0
    cfg.optimizer.update(spec.optimizer)
    cfg.eval.at_start = False  # `held_out_loss` evaluates these weights after the timed run
    cfg.checkpoint.every_steps = 0
    cfg.log.every_steps = 1
    cfg.update_from_flattened_dict(spec.ours["changes"])
    return cfg


class Lines(io.TextIOBase):
    """A stream that passes on the trainer's output and reads times from its lines.

    Attributes:
        first_step_s: seconds from the start of the process to the end of the first step.
        peak_rss_bytes: peak resident memory of this process after the last step.
        attention: the attention backend in use.
    """

    def __init__(self, started: float, to):
        self._started, self._to = started, to
        self.first_step_s = math.nan
        self.peak_rss_bytes = 0
        self.attention = ""

    def write(self, text: str) -> int:
        """Pass the text on and take note of the lines that matter."""
        if text.startswith("compiled and ran the first step"):
            self.first_step_s = time.time() - self._started
        elif text.startswith("attend"):
            self.attention = text.split()[1].rstrip(":")
        elif text.startswith("step") and "s/step" in text:
            self.peak_rss_bytes = contract.peak_rss_bytes()
        return self._to.write(text)

    def flush(self) -> None:
        """Flush the stream to which text is passed on."""
        self._to.flush()


def peak_bytes(lines: Lines) -> int:
    """Return the peak memory of training, of the fullest device or of the process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=lines.peak_rss_bytes)


def held_out_loss(spec: contract.Spec) -> float | None:
    """Return the mean loss of the held-out examples under the initial weights of the run."""
    if not spec.held_out:
        return None
    model = jax_sft.load(spec.model, dtype=spec.dtype)
    longest = max(len(ids) for ids, _ in contract.read_examples(spec.held_out))

    def nll(ids, mask) -> float:
        tokens = np.zeros((1, longest), np.int32)  # one length: one compilation
        tokens[0, : len(ids)] = ids
        logits = np.asarray(model.logits(tokens)[0, : len(ids) - 1], np.float64)
        highest = logits.max(axis=-1)
        log_sums = np.log(np.exp(logits - highest[:, None]).sum(axis=-1)) + highest
        losses = log_sums - np.take_along_axis(logits, np.array(ids[1:])[:, None], axis=-1)[:, 0]
        return float(losses @ np.array(mask[1:]))

    return contract.mean_loss(spec, nll)


if __name__ == "__main__":
    main()
