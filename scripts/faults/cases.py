"""Run the inputs that once failed, and report which give the right result now.

    python scripts/faults/cases.py CASES [NAME ...]

CASES is a folder with one folder per case, each with a run.sh that reads the path of this checkout
from JAX_SFT. NAME is the start of a case's name, such as 08. Prints a table, and the output of each
case that is wrong. Exits with 1 if a case is wrong. EXPECTED has the right output of each case.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900
# A bounded command that ended by itself within 30 s with code 64 or 1 and no traceback.
ENDED = r"exit (?:64|1)  (?!.*TRACEBACK)(?:\d|[12]\d|30) s, "


@dataclasses.dataclass(frozen=True)
class Expected:
    """Conditions on the output of a case.

    Attributes:
        right: regular expressions that must all match.
        wrong: regular expressions that must not match.
        lines: number of matches of the first of `right`; None = at least one.
    """

    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = (r"Traceback",)
    lines: int | None = None


EXPECTED = {
    "01": Expected((r"exit 0", r"already there|nothing is left to do"), (r"no good step",), 2),
    "02": Expected((r"(?m)^error: ", r"(?m)^checkpoints$", r"(?m)^metrics\.jsonl$"), lines=2),
    "03": Expected((r"exit 0", r"'hello<\|im_end\|>'\s*\Z", r'"eos_token_id": ?\[\s*\d+,\s*\d+')),
    "04": Expected(wrong=(r"largest difference",)),
    "05": Expected((r"exit 64\nerror: .*parts/model",), lines=2),
    "06": Expected((r"would refuse nothing",), (r"leaves out",)),
    "07": Expected((r"exit 0",)),
    "08": Expected(
        (
            r"(?s)(first: exit 0.*second: exit 64|second: exit 64.*first: exit 0|"
            r"first: exit 64.*second: exit 0|second: exit 0.*first: exit 64)",
            r"step lines printed: 60, lines in metrics\.jsonl: 60",
        ),
        (r"WARNING", r"No such file"),
    ),
    "09": Expected((r"a prefix of some example: True",)),
    "10": Expected((r"step 1/3 .*loss (\S+) (?s:.*)step 1/3 .*loss \1 ", r"damaged")),
    "12": Expected((r"lr 9\.90e-06 .*lr 4\.95e-05",)),
    "14": Expected(
        (
            r"exit 0\ntrain (?s:.*?)exit 0\n",
            r"(?m)^done .*allow_changes",
            r"epochs=2\.0: exit 64\n",
            r"clip_norm'\): exit 0",
        )
    ),
    "15": Expected((r"train the model to say nothing", r"would refuse nothing")),
    "16": Expected((r"exit 0",), (r"codec|Traceback|exit [1-9]",), 3),
    "17": Expected((r"a loads",)),
    "18": Expected((ENDED,), (r"STOPPED", r"TRACEBACK"), 8),
    "19": Expected((ENDED,), (r"STOPPED", r"TRACEBACK"), 4),
    "20": Expected((ENDED,), (r"STOPPED", r"TRACEBACK"), 2),
    "21": Expected(
        (
            r"pipe: exit 0, saved: \d",
            r"full: exit 0, saved: \d",
            r"SIGINT: exit 75: .*\nsaved: \d",
            r"SIGHUP: exit 75: .*\nsaved: \d",
        ),
        (r"TRACEBACK",),
    ),
}


def problems(output: str, expected: Expected) -> list[str]:
    """Return the ways in which an output differs from what is expected."""
    messages = [f"no {pattern}" for pattern in expected.right if not re.search(pattern, output)]
    messages += [f"has {pattern}" for pattern in expected.wrong if re.search(pattern, output)]
    if expected.lines is not None:
        number = len(re.findall(expected.right[0], output))
        if number != expected.lines:
            messages.append(f"{number} instead of {expected.lines} x {expected.right[0]}")
    return messages


def run(case: Path) -> tuple[str, float]:
    """Run a case with a temporary TMPDIR, deleted afterwards; return its output and seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        env = os.environ | {"JAX_SFT": str(ROOT), "TMPDIR": scratch}
        done = subprocess.run(
            ["bash", str(case / "run.sh")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_S,
        )
    return done.stdout.decode(errors="replace"), time.monotonic() - began


def main() -> int:
    """Run the cases; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the inputs that once failed.")
    parser.add_argument("cases", type=Path)
    parser.add_argument("names", nargs="*", help="starts of names; default: all")
    options = parser.parse_args()
    chosen = [
        case
        for case in sorted(options.cases.glob("[0-9][0-9]-*"))
        if not options.names or case.name.startswith(tuple(options.names))
    ]
    num_wrong = 0
    for case in chosen:
        output, took = run(case)
        expected = EXPECTED.get(case.name[:2])
        messages = problems(output, expected) if expected else ["nothing is expected of it"]
        print(f"{case.name:34}{'WRONG' if messages else 'right':8}{took:6.0f} s", flush=True)
        for line in [*messages, *output.splitlines()] if messages else ():
            print(f"    {line[:200]}", flush=True)
        num_wrong += bool(messages)
    print(f"{len(chosen) - num_wrong} of {len(chosen)} right")
    return int(num_wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
