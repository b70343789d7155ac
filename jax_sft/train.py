"""Fine-tune a Hugging Face model.

    python -m jax_sft.train --config=configs/tiny.py [--workdir=DIR] [--config.KEY=VALUE ...]

Any key of jax_sft/config.py can be set, e.g. --config.optimizer.learning_rate=2e-5
--config.batch.rows=32 --config.data.train.main.path=my.jsonl. Training into a folder that holds a
checkpoint resumes it. The folder gets config.json, metrics.jsonl, data_report.json, checkpoints/
and, with --config.train.export=True, export/.
"""

import gc
import os
import sys
import types
from pathlib import Path

from jax_sft.runtime import huge_pages, lifecycle

if __name__ == "__main__":
    lifecycle.begin(requeues=True)
    huge_pages.use("-m", "jax_sft.train")  # before what takes long: it starts the program anew
    gc.disable()  # looking for garbage among what is imported takes an eighth of the imports' time

import jax
from absl import app, flags, logging

import jax_sft
from jax_sft import config
from jax_sft.hosts import cluster
from jax_sft.hosts.preemption import Preempted
from jax_sft.runtime import command_line
from jax_sft.training.run import train


class _CallableModule(types.ModuleType):
    """Lets `jax_sft.train` be both this module and the function, whichever is asked for first."""

    def __call__(self, cfg: config.Config, workdir: str | Path) -> dict[str, float]:
        return train(cfg, workdir)


sys.modules[__name__].__class__ = _CallableModule


def main(_: list[str]) -> None:
    """The command line."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
    workdir = flags.FLAGS.workdir or command_line.default_workdir()
    try:
        train(flags.FLAGS.config, workdir, jax_sft.BEGAN_S)
    except Preempted as stopped:
        is_children = "JAX_SFT_STATUS" in os.environ and "JAX_SFT_TYPED" not in os.environ
        if cluster.process_id() == 0 and not is_children:  # it is the launcher's to be typed
            stopped.add_note(f"resume: {lifecycle.typed()}")
        raise
    if jax.distributed.is_initialized():
        # Before Python waits for threads: after a save that failed on another process, Orbax's
        # hang in a barrier for minutes, which this ends.
        jax.distributed.shutdown()


def end(code: int) -> None:
    """End the process; one of several at once, as an orderly exit would wait for the others."""
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: it is never looked at again
    gc.enable()
    command_line.define_config()
    flags.DEFINE_string("workdir", "", "The run's folder; default runs/NAME_OF_CONFIG")
    lifecycle.run(lambda: app.run(main, flags_parser=command_line.parse_flags), end)
