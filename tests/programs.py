"""Programs that a test starts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count"
# A process that imports modules once and reads requests, JSON lines. {"start", "arguments", "env",
# "output"} starts a file or a module as a program, in a fork, and answers with the process id.
# {"poll": id} answers with its exit code, or null while it runs.
SERVER = """
import importlib, json, os, runpy, sys, warnings

modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
warnings.filterwarnings("ignore", message=".*fork")  # JAX has no threads until it has devices


def run(start, arguments, env, output):
    os.environ.update(env)
    for stream, file in zip((0, 1, 2), (os.devnull, *output)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), stream)
    sys.argv = [start, *arguments]
    if start.endswith(".py"):
        runpy.run_path(start, run_name="__main__")
    else:
        sys.modules.pop(start, None)
        runpy.run_module(start, run_name="__main__", alter_sys=True)


requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
while line := requests.readline():
    request = json.loads(line)
    if "poll" in request:
        child, status = os.waitpid(request["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if child else None
    elif (answer := os.fork()) == 0:
        run(**request)
        break
    print(json.dumps(answer), file=answers, flush=True)
"""


class Fork:
    """A program that a `Server` started, with the part of subprocess.Popen that tests use.

    Attributes:
        pid: its process id.
        returncode: its exit code, or None while it was not seen to have ended.
    """

    def __init__(self, server: "Server", pid: int):
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """Starts Python programs as forks of a process that has done their imports.

    Those take two seconds of each program's time. It is a context manager that leaves no program.

    Args:
        modules: what to import; nothing that starts threads or JAX's devices.
    """

    def __init__(self, *modules: str):
        self._started: list[Fork] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *modules],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, program: str | Path, *arguments: str, output: Path, **more: Any) -> Fork:
        """Start a program, a file or the name of a module.

        Args:
            output: file of what it prints.
            errors: another one for stderr.
            env: changes of its environment.
        """
        files = [str(output), str(more.get("errors", output))]
        request = {"start": str(program), "arguments": arguments, "output": files}
        fork = Fork(self, self.ask(request | {"env": more.get("env", {})}))
        self._started.append(fork)
        return fork

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        for fork in self._started:
            fork.send_signal(signal.SIGKILL)
            fork.wait(60)
        self._process.communicate()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program that has one device until its config says otherwise,
    and compiles as quickly as the tests.
    """
    flags = os.environ["XLA_FLAGS"].split()
    few = " ".join(flag for flag in flags if not flag.startswith(DEVICES))
    return os.environ | {"XLA_FLAGS": few} | more


def run_each(
    commands: Sequence[Sequence[str]], folder: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run programs one after another, each a module and its arguments.

    Args:
        folder: for what they print.
    """
    results = []
    with Server(*sorted({module for module, *_ in commands})) as server:
        for number, command in enumerate(commands):
            out, errors = (folder / f"{name}{number}" for name in ("out", "errors"))
            code = server.start(*command, output=out, errors=errors).wait(300)
            result = (code, out.read_text(), errors.read_text())
            results.append(subprocess.CompletedProcess([*command], *result))
    return results
