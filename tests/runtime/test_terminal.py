"""What a program prints never ends it; what it raises, and a signal, is one line and a code."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import jax_sft
from jax_sft.checkpoint import pretrained
from jax_sft.runtime import exit_codes, lifecycle, terminal

ROOT = Path(__file__).resolve().parents[2]
# Programs that import next to nothing: what is said of them holds for all.
PROGRAM = """\
import sys
from jax_sft.runtime import lifecycle
lifecycle.begin({requeues})
def main():
{body}
lifecycle.run(main)
"""


def run(
    body: str, requeues: bool = False, shell: str = "", **options
) -> subprocess.CompletedProcess:
    """Run a program; `shell` is a command line in which "$@" is it."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    command = [sys.executable, "-c", PROGRAM.format(requeues=requeues, body=indented)]
    if shell:
        command = ["bash", "-o", "pipefail", "-c", shell, "bash", *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=env, timeout=60, **options
    )


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" > /dev/full',
        '"$@" > /dev/full 2>&1',
        '"$@" 2> /dev/full',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@" 2>&1 | head -1 > /dev/null',
    ],
)
def test_output_that_nobody_takes_changes_no_exit_code(shell, tmp_path):
    body = "for n in range(4000): print('x' * 50, flush=n % 100 == 0)\n"
    body += "print('é\\udcff', file=sys.stderr); open('made', 'w').write('whole')\nreturn 3"
    found = run(body, shell=shell, cwd=tmp_path)
    assert found.returncode == 3
    assert (tmp_path / "made").read_text() == "whole"  # no output went into the next open file
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr


def test_a_training_says_that_its_stdout_is_lost_and_waits_for_no_reader(tmp_path):
    found = run("print('x', flush=True)", True, '"$@" > /dev/full')
    assert found.returncode == 0 and found.stderr.count("No space left on device") == 1
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    sink = terminal.Sink(write, runs_on=True)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "STUCK_S", 0.1)
        assert sink.write(b"nobody reads this\n") == 18 == sink.write(b"nor this, nor\nthat")
    assert 0.1 <= time.monotonic() - began < 5
    while len(os.read(read, 1 << 20)) == 1 << 20:
        pass
    sink.write(b"read again\n")
    text = os.read(read, 4096).decode()
    assert "36 bytes were dropped" in text and text.endswith("read again\n")
    os.close(read)
    os.close(write)


def test_control_characters_are_shown_and_progress_bars_move():
    assert terminal.escaped("a\x1b[2J\x9b\x7f\u202eb\r\t\n\u2066é") == (
        "a\\x1b[2J\\x9b\\x7f\\u202eb\\x0d\t\n\\u2066é"
    )
    bars = "\rreading:  50%|█████     |"
    assert terminal.printable(bars) == bars and terminal.printable("\x1b[A") == "\x1b[A"
    assert terminal.printable("\rx\x1b[A\r") == "\rx\\x1b[A\\x0d"


def test_a_line_after_a_progress_bar_begins_a_line():
    raw = io.BytesIO()
    stream = terminal._Stream(raw, encoding="utf-8")
    for text in ("\r 5%", "\r 6%", "told\n", "\r 7%", "\n", "a\n", "\r 8%", "\r   ", "\r", "b\n"):
        stream.write(text)
    stream.flush()
    assert raw.getvalue() == b"\r 5%\r 6%\ntold\n\r 7%\na\n\r 8%\r   \rb\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_encoded_is_replaced(encoding):
    found = run("print('é ⟪ \\x1b[31m \\udcff')", env={"PYTHONIOENCODING": encoding})
    assert found.returncode == 0 and "\\x1b[31m \\udcff" in found.stdout


def test_a_stream_of_somebody_else_may_fail_while_a_training_runs(monkeypatch):
    class Failing(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    (closed := io.StringIO()).close()
    for stream in (Failing(), closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        with terminal.guarded():
            print("lost", flush=True)
        assert sys.stdout is stream
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), "ascii"))
    with terminal.guarded():
        print("é\x1b")
    assert raw.getvalue() == b"\\xe9\\x1b\n"


class Panic(BaseException):
    """As pyo3_runtime.PanicException: no Exception."""


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("seed = -1"), 64, "error: seed = -1"),
        (FileNotFoundError(2, "No such file", "x.jsonl"), 64, "FileNotFoundError: .*x.jsonl"),
        (KeyError("a\nb\x1b"), 64, "unexpected KeyError: "),
        (RecursionError("deep"), 64, "unexpected RecursionError: deep"),
        (Panic("called `Result::unwrap()`"), 64, "unexpected Panic: called"),
        (RuntimeError("a device is gone"), 1, "unexpected RuntimeError: a device"),
        (OSError(5, "Input/output error"), 1, "unexpected OSError: .*Input/output"),
        (FloatingPointError("NaN"), 65, "error: NaN"),
        (lifecycle.Interrupted(signal.SIGTERM), 143, "stopped: SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped: SIGINT"),
        (SystemExit(2), 64, None),
        (SystemExit(0), 0, None),
    ],
)
def test_whatever_is_raised_is_one_line_and_a_code(
    error, code, line, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(lifecycle._Program, "folder", tmp_path)

    def main():
        raise error

    assert lifecycle._code_of(main) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == (line is not None)
    if line:
        assert re.search(line, printed)
    kept = [file.read_text() for file in tmp_path.iterdir()]
    assert len(kept) == ("unexpected" in printed) and all("in main" in text for text in kept)
    assert exit_codes.of(error) in (code, 1, 64)


INTERRUPTED = """\
import time, os, signal
try:
    print('ready', flush=True)
    {work}
finally:
    print('cleaned up', flush=True)
"""


@pytest.mark.parametrize(
    "work, signals, code, lines",
    [
        ("time.sleep(60)", [2], 130, ["cleaned up"]),
        ("time.sleep(60)", [1], 129, ["cleaned up"]),
        # Deaf as a compiler is: a C function that does not return.
        ("import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)", [2, 2], 130, []),
    ],
)
def test_ctrl_c_undoes_and_a_second_one_ends_at_once(work, signals, code, lines):
    body = "".join(f"    {line}\n" for line in INTERRUPTED.format(work=work).splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(requeues=False, body=body)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT},
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(1.5 * lifecycle.SAME_INTERRUPT_S)
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and out.splitlines() == lines
    assert err == f"stopped: {signal.Signals(signals[0]).name}\n"


def test_a_signal_while_python_ends_does_not_change_the_exit_code():
    body = """\
    import os, signal, sys
    class Late:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
            kill(pid, number)
    sys.modules["late"] = Late()
    return 75
"""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(requeues=True, body=body)], cwd=ROOT
    )
    assert found.returncode == 75


def test_a_second_request_is_told_from_one_that_comes_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now[0])

    def counts(*signals: tuple[float, str]) -> list[bool]:
        requests, found = lifecycle.Requests(), []
        for now[0], name in signals:
            found.append(requests.note(signal.Signals["SIG" + name]))
        return found

    assert counts((0, "INT"), (0.05, "INT"), (0.2, "INT")) == [True, False, True]
    assert counts((0, "TERM"), (2.9, "TERM"), (3.1, "USR1")) == [True, False, True]
    assert counts((0, "TERM"), (0.5, "INT")) == [True, True]
    assert counts((0, "INT"), (0.5, "TERM"), (9, "TERM")) == [True, False, True]
    # Who has pressed Ctrl-C closes the terminal while the run is saved.
    assert counts((0, "INT"), (9, "HUP"), (20, "HUP")) == [True, False, False]
    assert counts((0, "HUP"), (1, "HUP"), (9, "HUP")) == [True, False, True]


def test_ignored_signals_stay_ignored():
    body = "import os, signal\nos.kill(os.getpid(), 1); os.kill(os.getpid(), 2)\nprint('goes on')"
    found = run(body, shell="trap '' INT HUP; exec \"$@\"")
    assert (found.returncode, found.stdout) == (0, "goes on\n")


@pytest.mark.parametrize(
    "planted, line",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "memory of the devices"),
        (MemoryError("Unable to allocate 9 TiB"), "memory of this machine"),
    ],
)
def test_memory_that_is_too_small_for_a_start_is_a_user_error(
    planted, line, make_config, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise planted

    monkeypatch.setattr(pretrained, "read", full)
    with pytest.raises(ValueError, match=f"{line} is too small.*\n.*batch.micro_rows") as raised:
        jax_sft.train(make_config(), tmp_path / "run")
    assert exit_codes.of(raised.value) == 64


@pytest.mark.parametrize("key, value", [("seed", 2**63), ("train.steps", 2**31)])
def test_numbers_that_do_not_fit_are_refused(key, value, make_config, tmp_path):
    with pytest.raises(ValueError, match=f"{key} = {value}"):
        jax_sft.train(make_config(**{key: value}), tmp_path / "run")


def test_epochs_that_are_too_many_steps_are_refused(make_config, tmp_path):
    cfg = make_config(**{"train.steps": 0, "train.epochs": 1e9})
    with pytest.raises(ValueError, match=r"train.epochs = 1000000000.0 gives \d+ steps"):
        jax_sft.train(cfg, tmp_path / "run")
