"""Read untrusted JSON files with limits on type, size and nesting, and without ambiguous keys.

Called for every JSON file of a model or adapter folder, through `hf_folder.read_json`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from jax_sft.files import regular

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64  # of nested objects and lists


def read(file: Path, max_bytes: int = MAX_BYTES, strict: bool = True) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        strict: refuse keys with two different values, and numbers that are not finite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a FIFO, folder or device, is too large or nested too deep, is not
            UTF-8, JSON or an object, or contains something that `strict` refuses.
    """
    try:
        with regular.open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > max_bytes:
                raise ValueError(f"{file} has over {max_bytes / 2**20:.0f} MiB")
            content = opened.read(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_object if strict else None)
    except RecursionError:
        raise ValueError(f"{file} is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # from JSON, UTF-8, int() or `_object`
        raise ValueError(f"{file} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(parsed).__name__}")
    if _is_deeper(parsed, MAX_DEPTH):
        raise ValueError(f"{file} is nested more than {MAX_DEPTH} deep")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        # Compare as text, as == on deep values could exceed the recursion limit.
        if key in result and repr(result[key]) != repr(value):
            raise ValueError(f"{key!r} has two values")
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{key!r} must be a finite number")
        result[key] = value
    return result


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested deeper than `depth`."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
