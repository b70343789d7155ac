"""Lists of problems as text for messages: shortened, or numbered.

Called by whatever reports several problems at once.
"""

from collections.abc import Sequence


def at_most(lines: Sequence[str], most: int = 20) -> list[str]:
    """Return the first lines and, where there are more, a line that says how many."""
    more = len(lines) - most
    return [*lines[:most], f"... and {more} more"] if more > 0 else [*lines]


def numbered(heading: str, lines: Sequence[str]) -> str:
    """Return a heading, in which {} is the number of lines, and all lines with their numbers."""
    items = [f"\n  {number}. {line}" for number, line in enumerate(lines, start=1)]
    return heading.format(len(lines)) + ":" + "".join(items)
