"""What a process on CPUs keeps of the memory it once had."""

import os
import subprocess
import sys

import pytest

from jax_sft import memory

# Allocates and frees a large block as XLA does in each step, in a thread that came after `prepare`.
PROGRAM = """
import ctypes, resource, sys, threading
from jax_sft import memory

memory.prepare()
kept = memory.keep_freed(int(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(200 << 20)
    ctypes.memset(block, 1, 200 << 20)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
for _ in range(2):
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(kept, *faults)
"""


def run(num_params: int, **env: str) -> tuple[bool, int, int]:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(num_params)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return said[0] == "True", int(said[1]), int(said[2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")
def test_on_cpus_a_block_that_was_freed_costs_no_page_faults_the_second_time():
    kept, first, second = run(num_params=1000)
    assert kept and first > 100 and second < first / 10


@pytest.mark.parametrize(
    "num_params, env",
    [(10**15, {}), (1000, {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0"})],
)
def test_large_models_and_machines_with_gpus_give_memory_back(num_params, env):
    kept, first, second = run(num_params, **env)
    assert not kept and second > first / 2


def test_gpu_memory_is_what_the_environment_says_if_it_says(monkeypatch):
    monkeypatch.setattr(memory, "_mallopt", lambda *_: True)  # this process stays as it is
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    memory.prepare()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == str(memory.GPU_MEMORY)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    memory.prepare()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
