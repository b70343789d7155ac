"""The shape of the package: imports go downwards only, and names say what a file is for."""

import ast
import collections
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_sft
from jax_sft import models

PACKAGE = Path(jax_sft.__file__).parent
# A package, or a file at the root, imports only what stands above it here; within one there are no
# cycles. `files` and `launching` need little more than Python, `data` knows neither models nor
# weights.
LEVELS = [
    "batch settings",
    "hardware runtime sharding",
    "config files launching",
    "hosts",
    "ops report weights",
    "nn",
    "models",
    "adapters",
    "data",
    "checkpoint",
    "inference tiny validate",
    "training",
    "export_check planning",
    "cache convert doctor export inspect launch plan train verify __main__",  # the commands
]
LEVEL = {name: level for level, row in enumerate(LEVELS) for name in row.split()}
MOST_FILES = 13  # in a folder, but for families and commands
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def package_of(module: str) -> str:
    """Return the package of a module, or its own name at the root; "" = `jax_sft` itself."""
    return module.split(".")[1] if "." in module else ""


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def first_party(nodes: Iterator[ast.AST], module: str) -> set[str]:
    """The modules of ours that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides where it goes"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] == "jax_sft"}


IMPORTS = {module: first_party(ast.walk(parse(file)), module) for module, file in MODULES.items()}


def test_every_package_has_a_level_and_every_level_a_package():
    assert {package_of(module) for module in MODULES} - {""} == set(LEVEL)
    assert len(models.families()) >= 2


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_packages_below_its_own(module):
    own = package_of(module)
    above = {
        imported
        for imported in IMPORTS[module]
        if own and package_of(imported) not in ("", own)
        if LEVEL[package_of(imported)] >= LEVEL[own]
    }
    assert above == set()
    assert own or not IMPORTS[module]  # `import jax_sft` loads nothing


def test_imports_have_no_cycle():
    order = graphlib.TopologicalSorter(IMPORTS).static_order()
    assert {*order} >= {*MODULES}  # or it has raised


def test_a_folder_has_few_files():
    files = collections.Counter(
        file.parent.relative_to(PACKAGE) for file in FILES if file.name != "__init__.py"
    )
    del files[Path(".")], files[Path("models")]
    assert {folder: n for folder, n in files.items() if n > MOST_FILES} == {}


def test_no_first_party_import_hides_in_a_function():
    hidden = [
        f"{module}.{function.name} imports {sorted(found)}"
        for module, file in MODULES.items()
        for function in ast.walk(parse(file))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if (found := first_party(ast.walk(function), module))
    ]
    assert hidden == []


def test_config_formats_and_chat_do_not_load_jax():
    code = "import sys, jax_sft.config, jax_sft.data.sources.formats, jax_sft.data.chat.encoding\n"
    code += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
    claim = [sys.executable, "-c", "import jax; " + code]  # it can be false
    assert subprocess.run(claim, cwd=PACKAGE.parent).returncode == 1


def test_the_package_needs_no_torch():
    """But for `export --verify`, which runs transformers' model of what it wrote."""
    found = [
        f"{module} imports {name}"
        for module, file in MODULES.items()
        for name in imported_names(file)
        if name.split(".")[0] in ("torch", "tensorflow")
    ]
    assert {*found} == {"jax_sft.export_check imports torch"}
    at_the_top = [node for node in parse(MODULES["jax_sft.export_check"]).body if is_torch(node)]
    assert at_the_top == []


def is_torch(node: ast.AST) -> bool:
    return isinstance(node, ast.Import) and node.names[0].name.startswith("torch")


def imported_names(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_no_file_has_a_name_that_means_nothing():
    empty = {"utils", "util", "common", "helpers", "helper", "base", "misc", "v2"}
    here = Path(__file__).parent.parent
    files = [
        file
        for folder in ("jax_sft", "configs", "scripts", "tests")
        for file in (here / folder).rglob("*.py")
    ]
    assert len(files) > 30
    assert [file for file in files if empty & set(file.stem.removeprefix("test_").split("_"))] == []


def test_no_exception_is_caught_broadly_or_passed_over():
    broad, passed = [], []
    for module, file in MODULES.items():
        functions = [n for n in ast.walk(parse(file)) if isinstance(n, ast.FunctionDef)]
        handlers = [
            (f"{module}.{function.name}", node)
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, ast.ExceptHandler)
        ]
        everywhere = [n for n in ast.walk(parse(file)) if isinstance(n, ast.ExceptHandler)]
        assert len(handlers) >= len(everywhere), f"{module}: an except outside of functions"
        for where, node in handlers:
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind else "everything" for kind in kinds}
            if names & {"everything", "Exception", "BaseException"}:
                broad.append(where)
            if any(isinstance(statement, ast.Pass) for statement in node.body):
                passed.append(where)
    known = {
        "jax_sft.runtime.lifecycle._code_of",  # what a library raises at the end is one line
        "jax_sft.ops.attention.self_test._attempt",  # a kernel library fails, another is tried
        "jax_sft.checkpoint.orbax_io._call",  # Orbax raises any kind
    }
    assert set(broad) == known and passed == []
