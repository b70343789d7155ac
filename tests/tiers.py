"""Select the parameters of a test for the fast tier: every claim once; `test.sh --all` runs all.

A test whose parameters prove one claim on several families, meshes or seeds names the ones that the
fast tier runs: one for each structure that the claim depends on.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast(chosen: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` for pytest.mark.parametrize: all but the chosen ones are marked `full`.

    A tuple has a value for each of several arguments.
    """
    values = list(values)
    assert chosen and all(value in values for value in chosen), f"not all of {chosen} in {values}"
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [
        value if value in chosen else full(*each)
        for value, each in zip(values, tuples, strict=True)
    ]


def crossed(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Return all pairs; the fast tier runs those with the first row or the first column."""
    rows, columns = list(rows), list(columns)
    return [
        (row, column) if row == rows[0] or column == columns[0] else full(row, column)
        for row in rows
        for column in columns
    ]


def full(*values: Any) -> Any:
    """Return the `pytest.param` of a case that only `scripts/test.sh --all` runs."""
    return pytest.param(*values, marks=pytest.mark.full)
