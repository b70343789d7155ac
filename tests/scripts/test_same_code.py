"""scripts/same_code.py: other words are the same code, and nothing else is."""

import pytest

from scripts.same_code import normalized

BEFORE = '''
"""A module."""
import os
LIMIT = 3
def f(a, *, b=LIMIT):
    """Add."""
    found = [a + theirs for theirs in range(b)]
    with open(os.devnull) as file:
        told = file.read()
    def inner(c):
        return c + len(found) + len(told)
    return sorted(found, key=lambda one: inner(one))
class C:
    """A class."""
    found = 1
    def m(self):
        found = self.found
        return found
'''


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""Add."""', '"""Return the sum.\n\n    More words.\n    """'),
        ("    found = [", "    # a comment\n    found = ["),
        ("theirs", "number"),
        ("told", "text"),
        ("inner", "total"),
        (
            "        found = self.found\n        return found",
            "        n = self.found\n        return n",
        ),
    ],
)
def test_other_words_are_the_same_code(old, new):
    assert old in BEFORE and normalized(BEFORE.replace(old, new)) == normalized(BEFORE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT", "MOST"),
        ("f(a, *, b", "f(a, *, c"),  # a parameter
        ("b=LIMIT", "b=3"),
        ("self.found", "self.sum"),
        ("    found = 1", "    numbers = 1"),  # a class attribute
        ("len(told)", "len(found)"),  # another variable
        ("lambda one: inner(one)", "lambda one: inner(a)"),
        ("file.read()", "file.read(1)"),
        ("inner(c):\n        return c", "inner(c):\n        return a"),
        ("import os", "import os, sys"),
    ],
)
def test_other_code_is_not(old, new):
    assert old in BEFORE and normalized(BEFORE.replace(old, new)) != normalized(BEFORE)
