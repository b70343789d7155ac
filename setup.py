"""The parts of the package's description that pyproject.toml cannot express.

pip's requirements files may include one another, which setuptools' `dynamic` tables refuse. The
example configs lie beside the package in a clone and inside it in a wheel.
"""

from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
UNLISTED = ("jax_sft.configs", "jax_sft.inspect")  # the second has no __init__.py, and says why
EXTRAS = ("gpu", "plan", "track", "dev")


def requirements(name: str) -> Iterator[str]:
    """Yield the lines of a requirements file; those of requirements.txt are no extra's."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            included = line.removeprefix("-r ").strip()
            yield from requirements(included) if included != "requirements.txt" else ()
        elif line and not line.startswith("#"):
            yield line


setup(
    packages=[*find_packages(include=["jax_sft", "jax_sft.*"]), *UNLISTED],
    package_dir={"jax_sft.configs": "configs"},
    extras_require={extra: [*requirements(f"requirements-{extra}.txt")] for extra in EXTRAS},
)
