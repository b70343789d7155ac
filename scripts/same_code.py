"""Show that a change of words changes no code.

    python -m scripts.same_code REVISION [PATH ...]

Compares every Python file of REVISION with the file on disk. Docstrings, comments and the names of
local variables may differ, but nothing else. Parameters keep their names, as callers use them.
Exit code 0: all code is the same. 1: the files that differ are named.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def normalized(source: str) -> str:
    """Return a module's syntax tree as text: no docstrings, local variables by number."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Expr(ast.Constant("docstring"))
    for node in tree.body:
        _number(node, {}, 0)
    return ast.dump(tree)


def _number(node: ast.AST, names: dict[str, str], depth: int) -> None:
    """Replace local variables in place by their number, in the order in which they are bound.

    Args:
        names: {name: its replacement} in the scopes around the node.
        depth: how many of these scopes there are.
    """
    if isinstance(node, Function):
        outside = [
            *getattr(node, "decorator_list", []),
            *node.args.defaults,
            *node.args.kw_defaults,
            *(argument.annotation for argument in _arguments(node)),
            getattr(node, "returns", None),
        ]
        for part in filter(None, outside):
            _number(part, names, depth)
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        parameters = {argument.arg: argument.arg for argument in _arguments(node)}
        inner = names | parameters | _local(body, depth, parameters)
        for part in body:
            _number(part, inner, depth + 1)
        if not isinstance(node, ast.Lambda):
            node.name = names.get(node.name, node.name)
        return
    if isinstance(node, COMPREHENSIONS):
        names = names | _numbers(_stores([g.target for g in node.generators]), depth)
        depth += 1
    if isinstance(node, ast.Name):
        node.id = names.get(node.id, node.id)
    elif isinstance(node, ast.ExceptHandler | ast.ClassDef | ast.MatchAs | ast.MatchStar):
        if node.name:
            node.name = names.get(node.name, node.name)
    elif isinstance(node, ast.alias) and names:
        bound = node.asname or node.name.partition(".")[0]
        node.asname = names.get(bound, node.asname)
    elif isinstance(node, ast.Global | ast.Nonlocal):
        node.names = [names.get(name, name) for name in node.names]
    for child in ast.iter_child_nodes(node):
        _number(child, names, depth)


def _arguments(node: Function) -> list[ast.arg]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*every, *filter(None, (arguments.vararg, arguments.kwarg))]


def _local(body: Sequence[ast.AST], depth: int, parameters: dict[str, str]) -> dict[str, str]:
    """Return {local variable of a function: its number}, without the parameters."""
    declared = {
        name
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Global | ast.Nonlocal)
        for name in node.names
    }
    return _numbers((name for name in _stores(body) if name not in declared | {*parameters}), depth)


def _numbers(names: Iterable[str], depth: int) -> dict[str, str]:
    return {name: f"local {depth}.{number}" for number, name in enumerate(dict.fromkeys(names))}


def _stores(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the names that nodes bind in their own scope, in order."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, COMPREHENSIONS):  # of what is within, only := binds outside
            for inner in ast.walk(node):
                if isinstance(inner, ast.NamedExpr):
                    yield inner.target.id
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        yield from _stores([*ast.iter_child_nodes(node)])


def git(*arguments: str) -> str:
    """Return the output of a git command."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Compare, print the differences and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("paths", nargs="*", default=["."], help="files or folders [all]")
    options = parser.parse_args(argv)
    before = set(git("ls-tree", "-r", "--name-only", options.revision, *options.paths).split("\n"))
    now = set(git("ls-files", *options.paths).split("\n"))
    num_files, changed = 0, []
    for name in sorted(name for name in before | now if name.endswith(".py")):
        num_files += 1
        if name not in before or name not in now:
            changed.append(f"{name}: only {'now' if name in now else 'before'}")
        elif normalized(git("show", f"{options.revision}:{name}")) != normalized(
            Path(name).read_text(encoding="utf-8")
        ):
            changed.append(f"{name}: other code")
    print("\n".join([*changed, f"{num_files} files, {len(changed)} with other code"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
