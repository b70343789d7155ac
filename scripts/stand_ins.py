"""Replace packages that read and write files by stand-ins, on machines that lack them.

A training step on random weights needs none of them: `install` lets jax_sft be imported without.
"""

import importlib.util
import sys
from unittest import mock

NAMES = (
    "grain",
    "orbax",
    "orbax.checkpoint",
    "tensorstore",
    "pyarrow",
    "pyarrow.parquet",
    "datasets",
)


def install() -> list[str]:
    """Install stand-ins for packages that are not installed; return the names of these packages."""
    missing = [name for name in NAMES if "." not in name and not _is_installed(name)]
    for name in NAMES:
        if name.partition(".")[0] in missing:
            sys.modules[name] = mock.MagicMock(name=name)
    return missing


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
