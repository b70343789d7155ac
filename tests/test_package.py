"""Install the package: its description, and a wheel that runs away from the clone."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import jax_sft

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("gpu", "plan", "track", "dev")
SOURCES = ("*.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements*.txt")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the sources, without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in (file for pattern in SOURCES for file in ROOT.glob(pattern)):
        shutil.copy(file, source)
    for folder in ("jax_sft", "configs"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={out}"]
    done = subprocess.run([*PIP, "wheel", *options, "."], cwd=source, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@dataclasses.dataclass(frozen=True)
class Installed:
    """A wheel that is installed into a folder of its own."""

    site: Path

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its command in a folder."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_SFT_")}
        env |= {"PYTHONPATH": str(self.site), "XLA_FLAGS": ""}
        command = [str(self.site / "bin" / "jax-sft"), *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """Install the wheel alone; this Python has the dependencies."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", f"--target={site}"]
    subprocess.run([*PIP, "install", *options, str(wheel)], check=True)
    return Installed(site)


def requirement(line: str) -> tuple[str, frozenset[str]]:
    """Split a requirement into its name with extras, and its versions in any order."""
    match = re.match(r"([\w.\[\]-]+)(.*)", line)
    assert match
    return match[1], frozenset(filter(None, match[2].replace(" ", "").split(",")))


def lines(file: str) -> set[tuple[str, frozenset[str]]]:
    """Read a requirements file with those that it includes, as pip does."""
    required = set()
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            required |= lines(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            required.add(requirement(line))
    return required


def test_the_wheel_holds_every_file_of_the_package_and_the_configs(wheel):
    expected = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "jax_sft").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    } | {f"jax_sft/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"jax_sft/py.typed", "jax_sft/configs/qwen7b.py"} < names


def test_the_wheel_has_the_version_of_the_package(metadata):
    assert metadata["Version"] == jax_sft.__version__


def test_extras_require_what_the_requirements_files_install(metadata):
    required: dict[str, set] = {extra: set() for extra in ("", *EXTRAS)}
    for line in metadata.get_all("Requires-Dist", []):
        text, _, marker = line.partition(";")
        extra = re.fullmatch(r' extra == "(\w+)"|', marker)
        assert extra, line
        required[extra[1] or ""].add(requirement(text.strip()))
    assert required[""] == lines("requirements.txt") and len(required[""]) > 10
    for extra in EXTRAS:
        assert required[""] | required[extra] == lines(f"requirements-{extra}.txt")
        assert required[extra]
    assert sorted(metadata.get_all("Provides-Extra", [])) == sorted(EXTRAS)


def test_the_tests_have_the_setuptools_that_builds(metadata):
    (wanted,) = re.findall(
        r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text()
    )
    assert int(importlib.metadata.version("setuptools").split(".")[0]) >= int(wanted)
    assert f"setuptools>={wanted}" in (ROOT / "requirements-test.txt").read_text().splitlines()


def test_the_command_of_a_wheel_runs_in_an_empty_folder(installed, tmp_path):
    package = installed.site / "jax_sft"
    shown = installed.run(tmp_path, "--help")
    assert shown.returncode == 0 and "\n  train " in shown.stdout
    missing = installed.run(tmp_path, "inspect", "--config=configs/tiny.py")
    example = f"{package}/configs/tiny.py"
    assert missing.returncode == 64 and f"use --config={example}, or a copy" in missing.stderr
    rows = [{"prompt": f"{number}", "response": f"{number}"[::-1]} for number in range(20)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = [f"--config.data.{name}.path=few.jsonl" for name in ("train.words", "eval.heldout")]
    done = installed.run(tmp_path, "inspect", f"--config={example}", "--dump=all.jsonl", *few)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2 * len(rows)
    assert not [path for path in package.rglob("*") if "runs" in path.parts]


def test_a_launcher_without_a_clone_starts_the_package_on_other_hosts(installed, tmp_path):
    options = ("--hosts=h1,h2", "--python=/opt/python", "--dry-run", "--config=x.py")
    done = installed.run(tmp_path, "launch", *options)
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in done.stdout.splitlines()] == ["h1: ", "h2: "]
    assert done.stdout.count("/opt/python -m jax_sft.launch --leash --config=x.py") == 2
