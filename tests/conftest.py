"""Shared fixtures: 8 fake CPU devices, tiny model folders of any family, tiny runs."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Tiny programs that run once are not worth optimizing: test_models takes a quarter less.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# The emitters of fusions take two thirds of the seconds of a compilation; 0.11 cannot do without.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Lowering writes ten lines of Python's stack into each operation otherwise: 8% of the seconds.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import atexit
import functools
import gc
import importlib.util
import re
import signal
import tempfile
from pathlib import Path

import pytest

from jax_sft.ops.attention import self_test
from tests import inputs

# A shell starts what ends in "&" with Ctrl-C ignored, and nohup ignores the end of the terminal;
# tests of both signals, and the programs that they start, need the answers of a usual process.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tokenized data of the tests, and of the programs that they run, goes with them.
_CACHE = tempfile.TemporaryDirectory(prefix="jax-sft-tests-")
atexit.register(_CACHE.cleanup)
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_addoption(parser):
    text = "write tests/data/tokens/token_digests.json again, after TOKENS_VERSION was raised"
    parser.addoption("--update-token-digests", action="store_true", help=text)


class WithoutTorch(pytest.Module):
    """A test file that imports torch, where torch is not installed.

    It is reported as skipped. requirements-dev.txt, which `.ci/run` installs, has torch;
    requirements-test.txt is for interpreters for which torch has no CPU build.
    """

    def collect(self):
        # The whole file, as it compares with torch; on 3.11, which `.ci/run` tests fully, it runs.
        pytest.skip(inputs.WITHOUT_TORCH, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Skip the files that compare with torch where it has no build, instead of failing there."""
    imports_torch = re.search(r"^import torch$", module_path.read_text("utf-8"), re.MULTILINE)
    if imports_torch and importlib.util.find_spec("torch") is None:
        return WithoutTorch.from_parent(parent, path=module_path)
    return None


MOST_WORKERS = 8  # each takes up to 3 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer `-n auto` (of scripts/test.sh): a worker per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_WORKERS)


def pytest_collection_finish() -> None:
    """Look for garbage rarely, and never in what was imported: a quarter of the seconds of tests
    that trace programs went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


@pytest.hookimpl(trylast=True)  # behind the fixtures of the file
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect what the tests of a file left, so that a warning about it comes with that file."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


# The self-test of attention is part of what these are about.
WITH_SELF_TEST = ("tests/ops/attention/", "tests/scripts/", "tests/training/test_start.py")


@pytest.fixture(autouse=True, scope="module")
def trusted_attention(request: pytest.FixtureRequest):
    """Leave out the self-test of attention: runs of other files compile for 2 s per mesh for it.

    The programs that tests start have it.
    """
    file = request.path.relative_to(request.config.rootpath).as_posix()
    with pytest.MonkeyPatch.context() as patch:
        if not file.startswith(WITH_SELF_TEST):
            patch.setattr(self_test, "self_test", lambda *_, **__: None)
        yield


@pytest.fixture
def make_model(tmp_path):
    """`inputs.write_model` into the folder of the test."""
    return functools.partial(inputs.write_model, tmp_path)


@pytest.fixture
def make_strong_model(tmp_path):
    """`inputs.write_strong_model` into the folder of the test."""
    return functools.partial(inputs.write_strong_model, tmp_path)


@pytest.fixture
def make_config(tmp_path):
    """`inputs.write_config` into the folder of the test."""
    return functools.partial(inputs.write_config, tmp_path)
