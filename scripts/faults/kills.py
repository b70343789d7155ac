"""Kill, stop and freeze a run at random moments, and check that its result does not change.

    python scripts/faults/kills.py [--kills=100] [--terms=20] [--freezes=5] [--seed=0]

Two processes under scripts/launch.sh are killed, asked to stop, or frozen, again and again. The
losses have to be bitwise those of an uninterrupted run. About 50 minutes on 2 cores.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path

from twenty_steps import (
    LAUNCH,
    SAVE_STEPS,
    Claims,
    environment,
    find,
    finish,
    losses,
    options,
    wait_until,
    workplace,
)

STEPS = 300
# One device per process.
SMALL = [f"--config.train.steps={STEPS}", "--config.mesh.cpu_devices=2", "--config.mesh.data=1"]
ROUND = 25  # kills per run, which then trains to its end
GRACE_S = 60
BOUND_S = 10  # train.stall_timeout_s of the frozen run
RESUMED = re.compile(r"resume  .* from step (\d+) of")


class Job:
    """A running launcher with two processes."""

    def __init__(self, work: Path, run: str, *more: str):
        self.run, self._log = work / run, work / f"{run}.log"
        # Practically no limit to failures without progress, as this script causes them.
        command = [LAUNCH, "--nproc=2", "--max-restarts=1000", f"--grace={GRACE_S}"]
        command += [*options(work, run), *SMALL, *more]
        with self._log.open("ab") as log:
            self._began = log.tell()
            self.process = subprocess.Popen(command, env=environment(work), stdout=log, stderr=log)

    def text(self) -> str:
        """Return the launcher's output so far."""
        return self._log.read_bytes()[self._began :].decode(errors="replace")

    def trainers(self) -> list[int]:
        """Return the process ids of both trainers, or [] until both run."""
        try:
            return [find(self.run, number) for number in (0, 1)]
        except LookupError:
            return []

    def complete(self) -> int:
        """Return the newest stored step; 0 = none."""
        folder = self.run / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def is_saving(self) -> bool:
        """Whether a save is in progress."""
        return any((self.run / "checkpoints").glob("*.incomplete*"))

    def wait_for(self, moment: str, chance: random.Random, before: list[int]) -> list[int]:
        """Wait for a moment of an attempt; return its process ids.

        Args:
            moment: "start", "step" or "save".
            before: process ids of the previous attempt.
        """
        processes: list[int] = []

        def is_new() -> bool:
            processes[:] = self.trainers()
            return bool(processes) and not {*processes} & {*before}

        wait_until(is_new, "both processes", 300)
        if moment == "start":
            time.sleep(chance.uniform(0, 14))
            return processes
        first = len(re.findall(r"compiled and ran", self.text()))

        def trains() -> bool:
            return (
                self.process.poll() is not None
                or len(re.findall(r"compiled and ran", self.text())) > first
            )

        wait_until(trains, "the first step", 300)
        if moment == "save":
            deadline = time.monotonic() + 20
            while not self.is_saving() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.5))
        else:
            time.sleep(chance.uniform(0, 8))
        return processes


def kill_often(work: Path, run: str, count: int, chance: random.Random, claims: Claims) -> None:
    """Kill one of two processes with SIGKILL, again and again."""
    job = Job(work, run)
    before: list[int] = []
    while_saving, lost, kinds, seen = 0, [], {"start": 0, "step": 0, "save": 0}, 0
    kills: list[tuple[int, int, int]] = []  # (resumes before it, newest complete step, furthest)
    while len(kills) < count and job.process.poll() is None:
        # Few kills are at the start, as the launcher waits longer before each restart of a run that
        # made no progress.
        moment = chance.choice(["start", "step", "step", "save", "save"])
        before = job.wait_for(moment, chance, before)
        if len(losses(job.run)) > STEPS - 40:
            break
        try:
            os.kill(before[chance.randrange(2)], signal.SIGKILL)
        except ProcessLookupError:
            continue
        while_saving += job.is_saving()
        kinds[moment] += 1
        seen = len(RESUMED.findall(job.text()))
        kills.append((seen, job.complete(), len(losses(job.run))))
    code = job.process.wait(timeout=600)
    resumes = [int(step) for step in RESUMED.findall(job.text())]
    for number, complete, furthest in kills:
        for step in resumes[number : number + 1]:  # the first resume after the kill
            if step < complete:
                claims.check(False, f"step {complete} was stored, resumed at {step}")
            lost.append(furthest - step)
            kept = furthest // SAVE_STEPS * SAVE_STEPS - SAVE_STEPS
            if step < kept:
                claims.check(False, f"at step {furthest} killed, resumed at {step}")
    claims.check(code == 0, f"{run}: ends with {code} after {len(kills)} kills {kinds}")
    text = f"{run}: {while_saving} kills during a save, {len(resumes)} resumes"
    claims.check(len(kills) == count, f"{text}, at most {max(lost, default=0)} steps done again")


def stop_often(work: Path, run: str, count: int, chance: random.Random, claims: Claims) -> None:
    """Send SIGTERM to the launcher or to one process, at random moments."""
    took, saved, stops = [], 0, 0
    while stops < count:
        job = Job(work, run)
        processes = job.wait_for(chance.choice(["start", "step", "save"]), chance, [])
        target = [job.process.pid, *processes][chance.randrange(3)]
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGTERM)
        code = job.process.wait(timeout=2 * GRACE_S)
        took.append(time.monotonic() - began)
        if code != 75:
            claims.check(False, f"SIGTERM no. {stops}: ends with {code}")
            if code == 0:
                break
        stops += 1
        if match := re.search(r"asked to stop: step (\d+) of \d+ is saved", job.text()):
            saved += 1
            if job.complete() != int(match[1]):
                claims.check(False, f"step {match[1]} said to be saved, {job.complete()} is there")
        elif "compiled and ran" in job.text():
            claims.check(False, f"SIGTERM no. {stops} while it trained: not saved")
    claims.check(
        Job(work, run).process.wait(timeout=900) == 0, f"{run}: the last start ends with 0"
    )
    text = f"{run}: {stops} times SIGTERM, {saved} while it trained, all of these saved; ended in "
    text += f"{statistics.median(took):.1f} s (median), {max(took):.1f} s (longest)"
    claims.check(max(took) < GRACE_S, text)


def freeze_often(work: Path, run: str, count: int, chance: random.Random, claims: Claims) -> None:
    """Freeze one of two processes with SIGSTOP for longer than the bound."""
    job = Job(work, run, f"--config.train.stall_timeout_s={BOUND_S}")
    before: list[int] = []
    took = []
    for _ in range(count):
        before = job.wait_for("step", chance, before)
        number = chance.randrange(2)
        num_messages = job.text().count("STOPPED:")
        os.kill(before[number], signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda n=num_messages: job.text().count("STOPPED:") > n, "a message", 120)
        took.append(time.monotonic() - began)
        line = job.text().split("STOPPED:")[-1].split("\n")[0]
        if f"process {number}" not in line:
            claims.check(False, f"process {number} was frozen, the other says: {line}")
    claims.check(job.process.wait(timeout=600) == 0, f"{run}: ends with 0 after {count} freezes")
    text = f"{run}: the other named it after {min(took):.1f} to {max(took):.1f} s"
    claims.check(max(took) < BOUND_S + 5, f"{text} (bound {BOUND_S} s)")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, claims = random.Random(asked.seed), Claims()
    with workplace("kills") as work:
        command = [LAUNCH, "--nproc=2", *options(work, "whole"), *SMALL]
        code = finish(command, environment(work), work / "whole.log")
        expected = losses(work / "whole")
        claims.check(code == 0 and len(expected) == STEPS, f"uninterrupted: ends with {code}")
        runs = [
            (kill_often, f"killed{first}", min(ROUND, asked.kills - first))
            for first in range(0, asked.kills, ROUND)
        ]
        runs += [(stop_often, "stopped", asked.terms), (freeze_often, "frozen", asked.freezes)]
        for do, run, count in runs:
            if count:
                do(work, run, count, chance, claims)
                claims.same(losses(work / run), expected, run)
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


if __name__ == "__main__":
    main()
