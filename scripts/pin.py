"""Write constraints.txt and constraints-gpu.txt: what pip chooses today for each supported Python.

    python scripts/pin.py python3.11 python3.12 python3.13

Nothing is installed. CI, the quickstart and scripts/test.sh install with these versions; review
the difference, run scripts/test.sh and commit. The tools of requirements-dev.txt are resolved for
the first interpreter only, which should be the one that CI has.

NVIDIA's libraries have a file of their own: the CUDA builds of torch pin other versions of them,
and torch is installed with constraints.txt.
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
    # A local label names one build among several (torch's +cpu); a pin without it fits each.
    found = {
        part["metadata"]["name"].lower().replace("_", "-"): part["metadata"]["version"]
        for part in report["install"]
    }
    pins = {name: version.partition("+")[0] for name, version in found.items()}
    return ".".join(report["environment"]["python_full_version"].split(".")[:2]), pins


def lines(pins: Mapping[str, Mapping[str, str]], pythons: Sequence[str]) -> list[str]:
    """Return a line per package and version, with a marker where not every Python has it.

    Args:
        pins: {package: {Python version: version}}.
    """
    found = []
    for name, versions in sorted(pins.items()):
        if len(set(versions.values())) == 1 and set(versions) in ({*pythons}, {pythons[0]}):
            found.append(f"{name}=={versions[pythons[0]]}")
            continue
        for python, version in versions.items():
            found.append(f'{name}=={version}; python_version == "{python}"')
    return found


def main(interpreters: Sequence[str]) -> None:
    """Resolve for each interpreter and write the file."""
    if not interpreters:
        sys.exit("error: name the interpreters: python3.11 python3.12 python3.13")
    pins: dict[str, dict[str, str]] = {}
    pythons = []
    for number, python in enumerate(interpreters):
        version, found = resolve(python, FILES if number else (*FILES, DEV))
        pythons.append(version)
        print(f"{python}: {len(found)} packages")
        for name, pin in found.items():
            pins.setdefault(name, {})[version] = pin
    pinned = lines(pins, pythons)
    nvidia = [line for line in pinned if line.startswith("nvidia-")]
    others = [line for line in pinned if line not in nvidia]
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(others) + "\n")
    (ROOT / "constraints-gpu.txt").write_text(GPU_HEAD + "\n".join(nvidia) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
