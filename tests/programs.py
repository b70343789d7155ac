"""Programs that a test starts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count"
# Imports a module once and runs each command, a list of arguments, in a fork of that process.
FORKS = """
import importlib, json, os, runpy, sys, tempfile, warnings

module, *commands = sys.argv[1:]
importlib.import_module(module)
del sys.modules[module]
warnings.filterwarnings("ignore", message=".*fork")  # JAX has no threads until it has devices
results = []
for arguments in map(json.loads, commands):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode())
        results.append((code, *texts))
print(json.dumps(results))
"""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program that has one device until its config says otherwise,
    and compiles as quickly as the tests.
    """
    flags = os.environ["XLA_FLAGS"].split()
    few = " ".join(flag for flag in flags if not flag.startswith(DEVICES))
    return os.environ | {"XLA_FLAGS": few} | more


def run_each(
    module: str, commands: Sequence[Sequence[str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python -m module` with each list of arguments, one after another.

    The imports, which take a short program most of its time, run once for all of them.
    """
    command = [sys.executable, "-c", FORKS, module, *map(json.dumps, commands)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        subprocess.CompletedProcess([module, *arguments], *result)
        for arguments, result in zip(commands, json.loads(done.stdout), strict=True)
    ]
