"""Where this user's caches are: tokenized data, compiled programs."""

import os
from pathlib import Path


def default() -> Path:
    """Return $XDG_CACHE_HOME/jax_sft, or ~/.cache/jax_sft."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()) / "jax_sft"
