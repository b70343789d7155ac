"""A program on CPUs gets its memory in huge pages, and is restarted for it at most once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_sft.runtime import huge_pages

REPO = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, resource, sys
print("began", os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
from jax_sft.runtime import huge_pages
huge_pages.use(*COMMAND)
import jax, jax.numpy as jnp
double = jax.jit(lambda x: x * 2)
jax.block_until_ready(double(jnp.ones(2**22)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
jax.block_until_ready(double(jnp.ones(2**24)))  # 64 MB twice
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# Where a kernel gives none on request there are no faults to count; the decision itself is tested
# on every kernel below, against a file of our own.
needs_huge_pages = pytest.mark.skipif(
    not huge_pages._are_on_request(), reason="this kernel gives huge pages to all or to none"
)


def run(folder: Path, command: str = "__file__", **environment: str) -> list[str]:
    """Run PROGRAM as a process; return what it printed."""
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("COMMAND", f"[{command}]"))
    env = {name: value for name, value in os.environ.items() if name != huge_pages.TUNABLES}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, script, "an argument"],
        env=env | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@needs_huge_pages
def test_a_program_starts_anew_once_and_its_arrays_take_few_page_faults(tmp_path):
    first, second, faults = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert first.endswith("glibc.malloc.perturb=0 ['an argument']")
    assert second.endswith("glibc.malloc.perturb=0:glibc.malloc.hugetlb=1 ['an argument']")
    assert first.split()[1] == second.split()[1], "another process"
    assert int(faults.split()[1]) < 2000  # in pages of 4 KiB: 32,768


@needs_huge_pages
@pytest.mark.parametrize(
    ("command", "tunables"), [("__file__", "glibc.malloc.hugetlb=0"), ("'-m', 'jax_sft.train'", "")]
)
def test_who_sets_the_tunable_or_runs_it_otherwise_is_left_alone(tmp_path, command, tunables):
    first, faults = run(tmp_path, command, GLIBC_TUNABLES=tunables)
    assert first.endswith(f"{tunables} ['an argument']")
    assert int(faults.split()[1]) > 20_000


def test_a_kernel_without_huge_pages_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "ON_REQUEST", tmp_path / "nothing")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    huge_pages.use(*sys.orig_argv[1:])


def test_on_gpus_nothing_is_started_anew(monkeypatch, tmp_path):
    device = tmp_path / "device"
    device.touch()
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    started = []
    monkeypatch.setattr(huge_pages, "GPU", device)
    monkeypatch.setattr(huge_pages, "ON_REQUEST", enabled)
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    for platforms in ("", "cpu"):
        monkeypatch.setenv(huge_pages.TUNABLES, "")
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        huge_pages.use(*sys.orig_argv[1:])
        assert started == ([(sys.executable, sys.orig_argv)] if platforms else [])
