"""The command `jax-sft` and the scripts that stand for its verbs: which program they become."""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_sft
from jax_sft import __main__ as dispatcher

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "export_hf": "export",
    "convert_hf": "convert",
    "verify_checkpoint": "verify",
    "verify_export": "verify",
}


@pytest.fixture
def started(monkeypatch) -> Iterator[list[list[str]]]:
    """Collect the programs that this process would become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.delenv("JAX_SFT_TYPED", raising=False)
    yield commands
    os.environ.pop("JAX_SFT_TYPED", None)


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_SFT_TYPED")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env | variables, capture_output=True, text=True
    )


def test_every_verb_is_a_module_of_the_package_and_in_the_help(capsys):
    assert dispatcher.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in dispatcher.VERBS:
        assert importlib.util.find_spec(f"jax_sft.{verb}")
        (line,) = (line for line in lines if line.startswith(f"  {verb} "))
        assert len(line) < 100
    wanted = "inspect plan doctor train launch export convert verify cache"
    assert [*dispatcher.VERBS] == wanted.split()


def test_a_verb_becomes_its_program_with_all_arguments(started):
    arguments = ["train", "--config=a b.py", "--config.seed=1", "--help"]
    dispatcher.main(arguments)
    assert started == [[sys.executable, "-m", "jax_sft.train", *arguments[1:]]]
    assert shlex.split(os.environ["JAX_SFT_TYPED"]) == ["jax-sft", *arguments]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a verb is missing: use one of inspect, plan,"),
        (["trian", "--config=x"], "there is no verb 'trian': use one of inspect, plan,"),
        (["--config=x"], "there is no verb '--config=x'"),
        (["lifecycle"], "there is no verb 'lifecycle'"),
    ],
)
def test_an_unknown_verb_is_one_line_and_64(started, capsys, arguments, said):
    assert dispatcher.main(arguments) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1 and not started


def test_the_version_is_printed(capsys):
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jax-sft {jax_sft.__version__}\n"


def test_the_dispatcher_imports_nothing_that_a_verb_may_not_need():
    code = "import sys, jax_sft.__main__; print(*sorted(n for n in sys.modules if '.' not in n))"
    loaded = run("-c", code).stdout.split()
    assert "jax_sft" in loaded
    assert not {"jax", "numpy", "absl", "flax", "transformers", "dataclasses"} & {*loaded}


def test_help_is_that_of_the_module_under_the_name_that_was_typed():
    short, long = run("-m", "jax_sft", "cache", "--help"), run("-m", "jax_sft.cache", "--help")
    assert short.returncode == long.returncode == 0
    assert short.stdout.startswith("usage: jax-sft cache [-h]")
    assert long.stdout.startswith("usage: python -m jax_sft.cache [-h]")
    assert short.stdout.split("\n\n", 1)[1] == long.stdout.split("\n\n", 1)[1] != ""


def test_a_mistake_behind_a_verb_ends_with_64():
    done = run("-m", "jax_sft", "verify", "--export=x", "--full")
    assert done.returncode == 64 and "--step and --full belong to --checkpoint" in done.stderr


@pytest.mark.parametrize(("script", "verb"), SCRIPTS.items())
def test_a_script_runs_from_any_folder_without_an_install(tmp_path, script, verb):
    done = run("-W", "error", str(ROOT / "scripts" / f"{script}.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m jax_sft.{verb} ")


@pytest.mark.parametrize("first", ["import jax_sft.{0}", "from jax_sft import {0}"])
def test_a_function_and_its_module_share_a_name(first):
    """`jax_sft.export` can be called and has a main function, whichever import comes first."""
    code = f"""
import types
{first.format("export")}
{first.format("train")}
import jax_sft
from jax_sft import export, train
assert export is jax_sft.export and train is jax_sft.train
for module in export, train:
    assert isinstance(module, types.ModuleType) and callable(module.main)
    try:
        module()
    except TypeError as error:
        assert "missing" in str(error)
    else:
        raise AssertionError(module)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_pythons_own_inspect_is_found_within_the_folder_of_the_package(tmp_path):
    """A file that is run puts its folder first on sys.path, and -c the current one."""
    code = "import sys, inspect; print(inspect.getfile(inspect))"
    for where in (ROOT / "jax_sft", ROOT):
        done = run("-c", code, cwd=where)
        assert done.stdout.strip().endswith("/inspect.py"), done.stderr
        assert "jax_sft" not in done.stdout
    (tmp_path / "inspect.py").write_text("")
    assert run("-c", code, cwd=tmp_path).returncode == 1  # it can be false
    found = run("-c", "import jax_sft.inspect; print(jax_sft.inspect.__path__)")
    assert str(ROOT / "jax_sft" / "inspect") in found.stdout


def test_a_verb_runs_as_a_file(tmp_path):
    file = ROOT / "jax_sft" / "train.py"
    done = run(str(file), "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "--workdir" in done.stdout, done.stderr
