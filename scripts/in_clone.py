"""Run a command of this clone's package from any folder, whether it is installed or not."""

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def run(module: str) -> NoReturn:
    """Replace this process by `python -m MODULE` with the arguments of this script."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]  # options of Python itself
    os.execv(sys.executable, [sys.executable, *options, "-m", module, *sys.argv[1:]])
