"""Write constraints.txt and constraints-gpu.txt: the versions pip chooses today for each Python.

    python scripts/pin.py python3.11 python3.12 python3.13

Nothing is installed. CI, the quickstart and scripts/test.sh install these versions. After running
this, review the difference, run scripts/test.sh and commit. The tools of requirements-dev.txt are
resolved only for the first interpreter, which should be that of CI.

NVIDIA's libraries have their own file, as torch is installed with constraints.txt, and the CUDA
builds of torch pin other versions of these libraries.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-gpu.txt", "requirements-plan.txt")
DEV = "requirements-dev.txt"
HEAD = """\
# The versions that CI installs: pip install -c constraints.txt -r requirements.txt
# Written by scripts/pin.py.
"""
GPU_HEAD = """\
# The same with NVIDIA's libraries: pip install -c constraints-gpu.txt -r requirements-gpu.txt
# Written by scripts/pin.py.
-c constraints.txt
"""


def resolve(python: str, files: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return (the interpreter's version such as "3.12", {package: version})."""
    requirements = [argument for name in files for argument in ("-r", str(ROOT / name))]
    options = ["--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command = [python, "-m", "pip", "install", *options, *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    # A local label names one of several builds (torch's +cpu); a pin without it matches them all.
    versions = {
        part["metadata"]["name"].lower().replace("_", "-"): part["metadata"]["version"]
        for part in report["install"]
    }
    pins = {name: version.partition("+")[0] for name, version in versions.items()}
    return ".".join(report["environment"]["python_full_version"].split(".")[:2]), pins


def lines(pins: Mapping[str, Mapping[str, str]], pythons: Sequence[str]) -> list[str]:
    """Return a line per package and version, with a marker unless it holds for every Python.

    Args:
        pins: {package: {Python version: version}}.
    """
    pinned = []
    for name, versions in sorted(pins.items()):
        if len(set(versions.values())) == 1 and set(versions) in ({*pythons}, {pythons[0]}):
            pinned.append(f"{name}=={versions[pythons[0]]}")
            continue
        for python, version in versions.items():
            pinned.append(f'{name}=={version}; python_version == "{python}"')
    return pinned


def main(interpreters: Sequence[str]) -> None:
    """Resolve the versions for each interpreter and write the files."""
    if not interpreters:
        sys.exit("error: name the interpreters: python3.11 python3.12 python3.13")
    pins: dict[str, dict[str, str]] = {}
    pythons = []
    for number, python in enumerate(interpreters):
        version, versions = resolve(python, FILES if number else (*FILES, DEV))
        pythons.append(version)
        print(f"{python}: {len(versions)} packages")
        for name, pin in versions.items():
            pins.setdefault(name, {})[version] = pin
    pinned = lines(pins, pythons)
    nvidia = [line for line in pinned if line.startswith("nvidia-")]
    others = [line for line in pinned if line not in nvidia]
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(others) + "\n")
    (ROOT / "constraints-gpu.txt").write_text(GPU_HEAD + "\n".join(nvidia) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
