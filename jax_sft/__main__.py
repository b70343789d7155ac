"""Run `jax-sft VERB ...`, a shorter name for the program `python -m jax_sft.VERB ...`.

jax-sft VERB [--help] ...
"""

import os
import shlex
import sys
from collections.abc import Sequence

import jax_sft
from jax_sft.runtime import exit_codes

VERBS = {
    "inspect": "show which tokens a config would train, before it does",
    "plan": "predict memory, traffic and speed of a run on GPUs that you do not have",
    "doctor": "check this machine, or all hosts of a launch, before a run",
    "train": "fine-tune a model, or resume a run",
    "launch": "train on one or many hosts, and restart when a process is lost",
    "export": "export a checkpoint as a Hugging Face folder, or adapters as a PEFT folder",
    "convert": "write a Hugging Face folder as a checkpoint, for clusters that start often",
    "verify": "compare the files of a checkpoint or an export with their checksums",
    "cache": "list or clear the caches of tokens and compiled programs",
}


def usage() -> str:
    """Return the help text, with one line for each verb."""
    lines = [f"  {verb:8} {line}" for verb, line in VERBS.items()]
    return "\n".join(
        [
            "usage: jax-sft VERB ...",
            "",
            "Supervised fine-tuning of Hugging Face language models in JAX.",
            "",
            *lines,
            "",
            "jax-sft VERB --help describes a verb; jax-sft --version prints the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace this process by the verb's program, or return an exit code if there is no verb."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return exit_codes.DONE
    if verb == "--version":
        print(f"jax-sft {jax_sft.__version__}")
        return exit_codes.DONE
    if verb not in VERBS:
        wrong = f"there is no verb {verb!r}" if verb else "a verb is missing"
        print(f"error: {wrong}: use one of {', '.join(VERBS)} (jax-sft --help)", file=sys.stderr)
        return exit_codes.USER_ERROR
    os.environ.setdefault("JAX_SFT_TYPED", shlex.join(["jax-sft", verb, *rest]))
    # Execute the program itself instead of calling a function of it, so that nothing differs: its
    # actions before the imports, its restart, and the folders that Python searches.
    os.execv(sys.executable, [sys.executable, "-m", f"jax_sft.{verb}", *rest])


if __name__ == "__main__":
    sys.exit(main())
