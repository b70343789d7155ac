"""The shape of the package: imports go downwards only, and names say what a file is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_sft
from jax_sft import models

PACKAGE = Path(jax_sft.__file__).parent
FAMILY = "models.FAMILY"  # stands for every model family, found by its file

# A file imports only from levels below its own.
LEVELS = [
    "paths exit_codes terminal text files batch parallel blocks remat_names ops.head_chunks "
    "models.fields",
    "lifecycle regular owner data.cache_room",
    "config cache_folder huge_pages startup tree "
    "models models.spec strict_json data.json_rows data.printed data.losses "
    "ops.backend planning.hlo planning.hlo_groups planning.chips planning.tables "
    "manifest fingerprint hub patterns "
    "plain_paths run_lock run_files "
    "launching.coordinates launching.gpus launching.environment launching.output launching.tied",
    "trackers placement "
    "launching.processes launching.leash launching.stop_requests launching.restarts "
    "models.rope "
    "command cluster steps sums storage vocabulary data.messages data.sandbox compute flops "
    "data.chat_templates data.confined "
    "ops.segments ops.reference ops.blockwise ops.grouped "
    "planning.targets planning.hlo_kernels planning.hlo_loops",
    "launching.child launching.fleet models.sizes "
    "agree outputs watchdog preemption preflight data.tables data.formats data.examples "
    "data.template data.tokenizer_file data.packing data.mixture data.show ops.cudnn ops.tokamax "
    "planning.hlo_collectives",
    "compilation_cache "
    "launching.supervisor launching.ssh launching.ray_cluster "
    "data.read data.turns ops.attention ops.cross_entropy ops.embedding model optim metrics hf "
    "planning.flops planning.page",
    "models.layers data.chat data.check state model_files hf_write planning.roofline",
    "models.experts data.worker data.loader resume same_weights lora nf4 planning.candidates",
    f"{FAMILY} checkpoint data.store health hf_convert tiny peft pretrained",
    "data.cache data.detokenize inference step trainable stop_tokens",
    "hf_export validate",
    "hf_verify data.prepare evaluate program",
    "data.outcomes planning.compiling",
    "planning.analysis",
    "planning.search",
    "launch train inspect.__main__ plan doctor cache export convert verify __main__",
]
LEVEL = {f"jax_sft.{name}": level for level, row in enumerate(LEVELS) for name in row.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
# Packages that only hold files, and the front door, import nothing of ours when imported.
DOORS = {f"jax_sft{name}" for name in ("", ".data", ".launching", ".ops", ".planning")}


def level_of(module: str) -> int | None:
    if module in {f"jax_sft.models.{family}" for family in models.families()}:
        module = f"jax_sft.{FAMILY}"
    return -1 if module in DOORS else LEVEL.get(module)


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


def test_every_module_has_a_level_and_every_level_a_module():
    assert [module for module in MODULES if level_of(module) is None] == []
    assert set(LEVEL) - set(MODULES) == {f"jax_sft.{FAMILY}"}
    assert len(models.families()) >= 2


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module):
    level = level_of(module)
    assert level is not None, f"give {module} a level"
    for imported in first_party(ast.walk(parse(MODULES[module])), module):
        below = level_of(imported)
        assert below is not None and below < level, f"{module} ({level}) -> {imported} ({below})"


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
    code = "import sys, jax_sft.config, jax_sft.data.formats, jax_sft.data.chat\n"
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
    assert {*found} == {"jax_sft.hf_verify imports torch"}
    at_the_top = [node for node in parse(MODULES["jax_sft.hf_verify"]).body if is_torch(node)]
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
    known = [
        "jax_sft.lifecycle._code_of",  # where a program ends, any error of a library is one line
        "jax_sft.ops.attention._attempt",  # whatever a kernel library raises, another one is tried
        "jax_sft.storage._call",  # Orbax raises any kind
    ]
    assert sorted(broad) == known and passed == []
