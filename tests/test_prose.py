"""Words of the package: docstrings say what a thing does or is, in the field's plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import jax_sft

PACKAGE = Path(jax_sft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PLACEHOLDERS = re.compile(r"\b(found|told|ours|theirs|of_\w+)\b")
MOST_PLACEHOLDERS = 3  # per 1,000 lines that are not blank
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


def test_prose_names_things():
    num_lines = sum(
        bool(line.strip()) for file in FILES for line in file.read_text("utf-8").splitlines()
    )
    placeholders = [
        f"{file.relative_to(PACKAGE)}: {word}"
        for file in FILES
        for text in (*docstrings(file), *comments(file))
        for word in PLACEHOLDERS.findall(text)
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
