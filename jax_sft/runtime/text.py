"""Format lists of problems for messages: shortened or numbered.

Used by all code that reports several problems at once.
"""

from collections.abc import Sequence


def at_most(lines: Sequence[str], most: int = 20) -> list[str]:
    """Return the first `most` lines and, if there are more, a line with the number of the rest."""
    more = len(lines) - most
    return [*lines[:most], f"... and {more} more"] if more > 0 else [*lines]


def numbered(heading: str, lines: Sequence[str]) -> str:
    """Return a heading, in which {} becomes the number of lines, and the numbered lines."""
    items = [f"\n  {number}. {line}" for number, line in enumerate(lines, start=1)]
    return heading.format(len(lines)) + ":" + "".join(items)
