"""Words of the package: docstrings say what a thing does or is, in the field's plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_sft

PACKAGE = Path(jax_sft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((PACKAGE.parent / "scripts").rglob("*.py"))
# Whole words of prose, names, their parts between underscores, and texts for users.
PLACEHOLDERS = re.compile(r"(?<![a-z])(found|told|ours|theirs)(?![a-z])|\b_*of_\w+", re.IGNORECASE)
MOST_PLACEHOLDERS = 3  # per 1,000 lines that are not blank
# In the records of scripts/bench.py and gpu_cases.py, jax_sft is the subject "ours".
SUBJECT = re.compile(r"\bours\b")
# Clauses and questions in the place of what a thing does or is.
HEADLESS = re.compile(r"(What|Who|Whose|Whoever|Of|Which|Where|How)\b")
# Other languages' idioms, and the other spelling: config keys are American.
OUTSIDE = re.compile(
    r"\b(beside|anew|lest|for ever|whoever|colours?|behaviours?"
    r"|\w*(?:quant|normal|initial)is(?:e|ing|ation)\w*)\b",
    re.IGNORECASE,
)


def docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text


def comments(file: Path) -> Iterator[str]:
    lines = io.StringIO(file.read_text(encoding="utf-8"))
    for token in tokenize.generate_tokens(lines.readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def test_no_docstring_opens_with_a_clause():
    headless = [
        f"{file.relative_to(PACKAGE)}: {text.splitlines()[0]}"
        for file in FILES
        for text in docstrings(file)
        if HEADLESS.match(text)
    ]
    assert headless == []


@pytest.mark.parametrize("files", [FILES, SCRIPTS], ids=["jax_sft", "scripts"])
def test_prose_and_code_name_things(files):
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    if files is SCRIPTS:
        texts = {file: SUBJECT.sub("subject", text) for file, text in texts.items()}
    num_lines = sum(bool(line.strip()) for text in texts.values() for line in text.splitlines())
    placeholders = [
        f"{file.name}: {match[0]}"
        for file, text in texts.items()
        for match in PLACEHOLDERS.finditer(text)
    ]
    assert 1000 * len(placeholders) / num_lines <= MOST_PLACEHOLDERS, placeholders


def test_prose_has_the_fields_words_and_one_spelling():
    outside = [
        f"{file.relative_to(PACKAGE)}: {word}"
        for file in FILES
        for text in (*docstrings(file), *comments(file))
        for word in OUTSIDE.findall(text)
    ]
    assert outside == []
