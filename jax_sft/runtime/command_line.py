"""The shared part of the command lines: the config file and the reports of mistakes."""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

import jax_sft
from jax_sft.runtime import config_help, exit_codes, lifecycle

# Exceptions raised by mistakes on the command line or in a config file.
CONFIG_ERRORS = (
    *(flags.Error, AttributeError, KeyError, TypeError, ValueError),
    *(ImportError, NameError, OSError, SyntaxError),
    *(ArithmeticError, AssertionError, RuntimeError),
)

HELP = {"-h", "-help", "--help", "-?"}


def define_config() -> None:
    """Define --config, the path of a Python file, and --config.KEY for every key."""
    config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/tiny.py")
    flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; report errors in it or in the config file without a traceback."""
    try:
        if (prefix := _help_config(argv)) is not None:
            print(config_help.as_text(prefix))
            sys.exit(0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)
    if HELP & {*argv[1:]}:
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)  # absl's own help exits with 1
    try:
        require_config_file(argv)
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS.config.seed  # raises here if the config file could not be loaded
        if len(rest) > 1:
            raise ValueError(f"unexpected arguments {rest[1:]}: options start with --")
        leave_torch_out()  # after the config file, which may import torch
        return rest
    except CONFIG_ERRORS as error:
        if lifecycle.shows_traceback():
            raise
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError | KeyError):
            text += " (--help-config lists all keys)"
        hint = "(--help lists the options; JAX_SFT_TRACEBACK=1 shows where)"
        print(f"error: {text}\n{hint}", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)


def _help_config(argv: Sequence[str]) -> str | None:
    """Return the prefix in --help-config[=PREFIX]; None if the option is not given."""
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option in ("--help-config", "--help_config"):
            return value if equals or following.startswith("-") else following
    return None


def require_config_file(argv: Sequence[str]) -> None:
    """Check that the file of --config exists, before overrides of its keys hide that it does not.

    Raises:
        FileNotFoundError: the file does not exist; the message names the example to use instead.
    """
    file = ""
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-config"):
            file = (value if equals else following).partition(":")[0]  # FILE:ARGUMENT
    if not file or Path(file).exists():
        return
    examples = example_configs()
    known = examples / Path(file).name
    advice = f"use --config={known}, or a copy" if known.exists() else f"examples are in {examples}"
    raise FileNotFoundError(f"there is no config file {file} in {Path.cwd()}: {advice}")


def example_configs() -> Path:
    """Return the folder of example configs, in a clone or inside an installed package."""
    package = Path(jax_sft.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def default_workdir() -> Path:
    """Return runs/NAME_OF_CONFIG, the workdir of a program without --workdir."""
    return Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def again(changes: Mapping[str, Any]) -> str:
    """Return the command that starts this run again with changed config keys.

    If Python code or a launcher started the trainer, return the options to add to its command.
    """
    options = " ".join(_quoted(f"--config.{key}", f"{value}") for key, value in changes.items())
    if not sys.argv[0].endswith("/jax_sft/train.py") or os.environ.get("JAX_SFT_NUM_PROCESSES"):
        return f"the same command with {options}"
    arguments = " ".join(_quoted(*arg.partition("=")[::2]) for arg in sys.argv[1:])
    return f"{lifecycle.program()} {arguments} {options}"


def _quoted(option: str, value: str) -> str:
    """Return an option quoted for a shell, in double quotes if they are enough."""
    text = f"{option}={value}" if value else option
    if shlex.quote(text) == text:
        return text
    if re.search(r'["$`\\!]', text) or shlex.quote(option) != option:
        return shlex.quote(text)
    return f'{option}="{value}"'


def leave_torch_out() -> None:
    """Keep transformers from importing an installed PyTorch, which tokenizers do not need.

    The import would take 2 s. Afterwards this process cannot import torch, so only programs of
    jax_sft may call this function.
    """
    if "transformers" not in sys.modules and "torch" not in sys.modules:
        # None blocks the import, as Python documents; type checkers know modules only.
        sys.modules["torch"] = None  # type: ignore[assignment]
