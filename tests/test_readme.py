"""README and BUILD name what there is, and nothing that is not."""

import re
from pathlib import Path

import pytest

from jax_sft import models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TREE = README.split("## Files")[1].split("##")[0]


def test_the_tree_names_every_command_file_and_package():
    there = {f.name for f in (ROOT / "jax_sft").glob("*.py")} - {"__init__.py"}
    there |= {f"{f.parent.name}/" for f in (ROOT / "jax_sft").glob("*/*.py")}
    assert set(re.findall(r"^      (\w+(?:\.py|/)) ", TREE, re.MULTILINE)) == there


@pytest.mark.parametrize("text", ["README.md", "BUILD.md"])
def test_every_path_that_is_named_exists(text):
    named = re.findall(
        r"\b((?:configs|scripts|tests|jax_sft)/[\w/.]+\.\w+)", (ROOT / text).read_text()
    )
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_family_is_named():
    assert [name for name in models.families() if f"`{name}`" not in README] == []
