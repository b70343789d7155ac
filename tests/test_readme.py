"""README and the other documents name files, commands and keys that exist."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from jax_sft import config, models
from jax_sft.__main__ import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TREE = README.split("## Files")[1].split("##")[0]
DOCUMENTS = [
    *("README.md", "BUILD.md", "CONTRIBUTING.md", "SECURITY.md"),
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
EVERY_DOCUMENT = pytest.mark.parametrize("name", DOCUMENTS)
OPEN = ("data.train", "data.eval")  # users name the sources below


def text(name: str) -> str:
    return (ROOT / name).read_text()


def commands(name: str) -> list[tuple[str, str]]:
    """(module, arguments) of every command of ours, with its continuation lines joined."""
    joined = text(name).replace("\\\n", " ")
    found = re.findall(r"(?:jax-sft |python -m jax_sft\.)([a-z]+)([^`\n#]*)", joined)
    return [(verb, arguments) for verb, arguments in found]


@functools.cache
def python_files() -> set[str]:
    """Names of the package's files, by every path that ends in them."""
    parts = [f.relative_to(ROOT).parts for f in (ROOT / "jax_sft").rglob("*.py")]
    return {"/".join(path[start:]) for path in parts for start in range(len(path))}


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_tree_names_every_command_file_and_package():
    there = {f.name for f in (ROOT / "jax_sft").glob("*.py")} - {"__init__.py"}
    there |= {f"{f.parent.name}/" for f in (ROOT / "jax_sft").glob("*/*.py")}
    assert set(re.findall(r"^      (\w+(?:\.py|/)) ", TREE, re.MULTILINE)) == there


def test_the_architecture_shows_the_levels_that_are_enforced():
    """Those of LEVELS in test_imports.py, each on a line of its own."""
    source = re.search(r"^LEVELS = (\[.*?^\])", text("tests/test_imports.py"), re.M | re.S)
    assert source
    block = "\n".join(f"    {level}" for level in ast.literal_eval(source[1]))
    assert block in text("docs/architecture.md"), f"docs/architecture.md needs\n{block}"


@EVERY_DOCUMENT
def test_every_path_that_is_named_exists(name):
    folders = "configs|scripts|tests|jax_sft|docs"
    named = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]+\.\w+)", text(name))
    assert [path for path in named if not (ROOT / path).exists()] == []


@EVERY_DOCUMENT
def test_every_python_file_that_is_named_exists(name):
    named = re.findall(r"`([\w/]+\.py)`", text(name))
    missing = [file for file in named if not (ROOT / file).exists() and file not in python_files()]
    assert missing == []


@EVERY_DOCUMENT
def test_every_link_leads_somewhere(name):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if target.startswith("https://"):
            continue
        if not file.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            broken += [target] * (anchor not in map(slug, headings))
    assert broken == []


@EVERY_DOCUMENT
def test_every_module_that_a_command_runs_exists(name):
    modules = re.findall(r"python -m ((?:jax_sft|scripts)[.\w]*\w)", text(name))
    modules = [module for module in modules if not module.endswith(".VERB")]
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@EVERY_DOCUMENT
def test_every_verb_is_a_verb(name):
    verbs = re.findall(r"(?:^ +|`)jax-sft ([a-z]+)", text(name), re.MULTILINE)
    assert [verb for verb in verbs if verb not in VERBS] == []


@EVERY_DOCUMENT
def test_every_flag_of_a_verb_is_its_flag(name):
    wrong = []
    for verb, arguments in commands(name):
        module = ROOT / "jax_sft" / verb
        file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        source = file.read_text() + text("jax_sft/runtime/command_line.py")
        flags = re.findall(r"--([a-z][a-z-]*)(?![\w.-])", arguments)
        known = re.findall(r'"(?:--)?([a-z][a-z-]*)"', source) + ["help"]
        wrong += [f"{verb} --{flag}" for flag in flags if flag not in known]
    assert wrong == []


@EVERY_DOCUMENT
def test_every_key_that_is_named_is_a_key(name):
    cfg = config.default()
    groups = "|".join(key for key, value in cfg.items() if hasattr(value, "keys"))
    keys = re.findall(r"--config\.([a-z0-9_.]*[a-z0-9_])", text(name))
    keys += re.findall(rf"`((?:{groups})\.[a-z0-9_.]*[a-z0-9_])(?: ?=[^`]*)?`", text(name))
    keys = [key for key in keys if not key.endswith(".py")]
    wrong = config.unknown(keys)
    for key in keys:
        _, is_open, rest = key.partition(next((f"{o}." for o in OPEN if key.startswith(o)), "\0"))
        if is_open and "." in rest and rest.split(".")[1] not in config.source(""):
            wrong.append(key)
    assert wrong == []


def test_every_family_is_named():
    named = README + text("docs/models.md")
    assert [name for name in models.families() if f"`{name}`" not in named] == []
