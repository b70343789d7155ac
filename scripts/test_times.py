"""Measure what each test file costs, and list it with its claim in docs/proofs.md.

    python -m scripts.test_times                  # the fast tier; prints the table
    python -m scripts.test_times --all --write    # all tests; writes it into docs/proofs.md
    python -m scripts.test_times --slowest=30 tests/models

Other arguments go to pytest. Seconds are those of a processor, of the tests and of the programs
that they start, so that other work on the machine changes them little. The claim of a file is the
first paragraph of its docstring.
"""

import argparse
import ast
import collections
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "proofs.md"
BEGIN, END = "<!-- test_times: begin -->", "<!-- test_times: end -->"


def processor_s() -> float:
    """Return the processor seconds of this process and of the children that have ended."""
    return sum(os.times()[:4])


class Clock:
    """Adds to each report the processor seconds since the one before; pytest's workers have it."""

    def __init__(self) -> None:
        self.last = processor_s()

    def pytest_runtest_logstart(self) -> None:
        self.last = processor_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = processor_s()
        report.processor_s, self.last = now - self.last, now
        return report


class Times:
    """Adds up the seconds of all reports, in the process that shows them.

    Attributes:
        fast, full: {test: processor seconds} of either tier.
        failed: whether a test did.
    """

    def __init__(self) -> None:
        self.fast: dict[str, float] = collections.defaultdict(float)
        self.full: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report) -> None:
        tier = self.full if "full" in report.keywords else self.fast
        tier[report.nodeid] += getattr(report, "processor_s", 0.0)


def pytest_configure(config: pytest.Config) -> None:
    """Time the tests: pytest loads this file as a plugin, in each of its workers too."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Clock())


def claim(file: Path) -> str:
    """Return the first paragraph of a test file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def table(times: Times) -> str:
    """Return the table: a line per file, the most expensive first within each folder."""
    files = sorted({name.split("::")[0] for name in (*times.fast, *times.full)})

    def figures(file: str) -> list[str]:
        cells = []
        for tier in (times.fast, times.full):
            seconds = [s for name, s in tier.items() if name.split("::")[0] == file]
            cells += [str(len(seconds)), f"{sum(seconds):.1f}"]
        return cells

    lines = [
        "| claim | tests | fast tier | s | `--all` adds | s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for file in files:
        lines.append(f"| {claim(ROOT / file)} | {' | '.join([f'`{file}`', *figures(file)])} |")
    totals = [
        text
        for tier in (times.fast, times.full)
        for text in (str(len(tier)), f"{sum(tier.values()):.0f}")
    ]
    lines.append(f"| all | | {' | '.join(totals)} |")
    return "\n".join(lines)


def machine() -> str:
    """Return what the seconds depend on, in words."""
    processors = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*: (.*)", processors.read_text()) if processors.exists() else []
    )
    name = names[0] if names else platform.processor() or platform.machine()
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "torch")]
    return (
        f"Processor seconds on {os.cpu_count()} cores of {name}, "
        f"Python {platform.python_version()}, {', '.join(versions)}."
    )


def main() -> int:
    """Run the tests, print or write the table; return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="the tests of --all too")
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.relative_to(ROOT)}")
    parser.add_argument("--slowest", type=int, default=0, help="print so many tests as well")
    options, rest = parser.parse_known_args()
    arguments = ["-p", "scripts.test_times", "-n", "auto", "--dist", "worksteal"]
    arguments += ["-m", "not slow"] * options.all + rest
    times = Times()
    code = pytest.main(arguments, plugins=[times])
    seconds_of = times.fast | times.full
    slowest = sorted(seconds_of.items(), key=lambda item: item[1], reverse=True)
    for name, seconds in slowest[: options.slowest]:
        print(f"{seconds:8.2f} s  {name}")
    command = " ".join(["python -m scripts.test_times", *sys.argv[1:]])
    text = f"{machine()} Written by `{command}`.\n\n{table(times)}"
    if not options.write:
        print(text)
        return code
    if code:
        sys.exit("error: tests failed; the table is not written")
    before, _, rest_of_file = TABLE.read_text().partition(BEGIN)
    _, end, after = rest_of_file.partition(END)
    if not end:
        sys.exit(f"error: {TABLE} has no lines {BEGIN} and {END} to write between")
    TABLE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return code


if __name__ == "__main__":
    sys.exit(main())
