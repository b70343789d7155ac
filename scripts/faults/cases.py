"""Run the inputs that once failed, and say which give the right result now.

    python scripts/faults/cases.py CASES [NAME ...]

CASES is a folder with one folder per case, each with a run.sh that takes the checkout from JAX_SFT.
NAME is the start of a case's name, such as 08. Prints a table, and the output of each case that is
wrong; exits with 1 if one is. What is right for each case stands in EXPECTED.
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
# A bounded command that ended by itself within 30 s with one of the codes, and no traceback.
ENDED = r"exit (?:64|1)  (?!.*TRACEBACK)(?:\d|[12]\d|30) s, "


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the output of a case must match.

    Attributes:
        right: regular expressions that are all found.
        wrong: regular expressions of which none is found.
        lines: how often the first of `right` is found; None = at least once.
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
    """Say in which ways an output is not what is expected."""
    found = [f"no {pattern}" for pattern in expected.right if not re.search(pattern, output)]
    found += [f"has {pattern}" for pattern in expected.wrong if re.search(pattern, output)]
    if expected.lines is not None:
        number = len(re.findall(expected.right[0], output))
        if number != expected.lines:
            found.append(f"{number} instead of {expected.lines} x {expected.right[0]}")
    return found


def run(case: Path) -> tuple[str, float]:
    """Run a case in a temporary folder that goes afterwards; return its output and seconds."""
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
    wrong = 0
    for case in chosen:
        output, took = run(case)
        expected = EXPECTED.get(case.name[:2])
        found = problems(output, expected) if expected else ["nothing is expected of it"]
        print(f"{case.name:34}{'WRONG' if found else 'right':8}{took:6.0f} s", flush=True)
        for line in [*found, *output.splitlines()] if found else ():
            print(f"    {line[:200]}", flush=True)
        wrong += bool(found)
    print(f"{len(chosen) - wrong} of {len(chosen)} right")
    return int(wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
