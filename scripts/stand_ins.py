"""Stand-ins for packages that read and write files, on machines that lack them.

A training step on random weights needs none: `install` lets the package be imported without.
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
    """Put stand-ins in the place of packages that are not installed; return the names of these."""
    missing = [name for name in NAMES if "." not in name and not _is_installed(name)]
    for name in NAMES:
        if name.partition(".")[0] in missing:
            sys.modules[name] = mock.MagicMock(name=name)
    return missing


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
