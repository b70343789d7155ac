"""Fine-tune a Hugging Face model.

    python -m jax_sft.train --config=configs/tiny.py [--workdir=DIR] [--config.KEY=VALUE ...]

--help-config lists all keys, --help-config=optimizer those of a section. Any key can be set, e.g.
--config.optimizer.learning_rate=2e-5 --config.data.train.main.path=my.jsonl. If the folder holds a
checkpoint, training resumes from it. Writes config.json, metrics.jsonl, data_report.json,
checkpoints/ and, with --config.train.export=True, export/ into the folder.
"""

import gc
import os
import sys
import types
from pathlib import Path

from jax_sft.runtime import huge_pages, lifecycle

if __name__ == "__main__":
    lifecycle.begin(requeues=True)
    huge_pages.use("-m", "jax_sft.train")  # before slow imports, as it restarts the program
    gc.disable()  # garbage collection would take an eighth of the time of the imports

import jax
from absl import app, flags, logging

import jax_sft
from jax_sft import config
from jax_sft.hosts import cluster
from jax_sft.hosts.preemption import Preempted
from jax_sft.runtime import command_line
from jax_sft.training.run import train


class _CallableModule(types.ModuleType):
    """Makes `jax_sft.train` both this module and the function, in any order of access."""

    def __call__(self, cfg: config.Config, workdir: str | Path) -> dict[str, float]:
        return train(cfg, workdir)


sys.modules[__name__].__class__ = _CallableModule


def main(_: list[str]) -> None:
    """Run the command line."""
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it accesses
    workdir = flags.FLAGS.workdir or command_line.default_workdir()
    try:
        train(flags.FLAGS.config, workdir, jax_sft.BEGAN_S)
    except Preempted as stopped:
        is_children = "JAX_SFT_STATUS" in os.environ and "JAX_SFT_TYPED" not in os.environ
        # Under the launcher, `typed` is the user's command only if JAX_SFT_TYPED holds it.
        if cluster.process_id() == 0 and not is_children:
            stopped.add_note(f"resume: {lifecycle.typed()}")
        raise
    if jax.distributed.is_initialized():
        # Must come before Python waits for threads. After a save that failed on another process,
        # Orbax's threads hang in a barrier for minutes, which the shutdown ends.
        jax.distributed.shutdown()


def end(code: int) -> None:
    """End the process, immediately if there are several: an orderly exit waits for the others."""
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    gc.freeze()  # imported objects stay alive, so exclude them from all later collections
    gc.enable()
    command_line.define_config()
    flags.DEFINE_string("workdir", "", "The run's folder; default runs/NAME_OF_CONFIG")
    lifecycle.run(lambda: app.run(main, flags_parser=command_line.parse_flags), end)
