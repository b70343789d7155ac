"""Lists of problems in messages."""

from jax_sft.runtime.text import at_most, numbered


def test_at_most_so_many_lines_and_how_many_more_there_are():
    lines = ["a", "b", "c"]
    assert at_most(lines) == at_most(lines, 3) == lines and at_most([]) == []
    assert at_most(lines, 2) == ["a", "b", "... and 1 more"]
    assert len(at_most(["x"] * 1000)) == 21


def test_a_numbered_list_says_how_many_lines_it_has():
    assert numbered("{} problem(s)", ["a", "b"]) == "2 problem(s):\n  1. a\n  2. b"
