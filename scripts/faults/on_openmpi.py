"""Check runs under real Open MPI on this machine.

    python scripts/faults/on_openmpi.py

Two ranks have to equal one process, and a killed rank has to be restarted. Needs the Debian package
openmpi-bin. About 3 minutes on 2 cores.
"""

import os
import signal
import subprocess

from twenty_steps import (
    LAUNCH,
    SAVE_STEPS,
    Claims,
    alone,
    environment,
    finish,
    kill,
    losses,
    need,
    options,
    wait_for_step,
    workplace,
)

MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2"]
if os.geteuid() == 0:
    MPIRUN.append("--allow-run-as-root")


def main() -> None:
    """Run all checks."""
    need("mpirun", packages="openmpi-bin")
    claims = Claims()
    with workplace("openmpi") as work:
        env = environment(work)
        expected = alone(work)
        code = finish([*MPIRUN, LAUNCH, *options(work, "two")], env, work / "two.log")
        claims.check(code == 0, f"mpirun of two ranks ends with {code}")
        two = losses(work / "two")
        claims.equal(two, expected, "two ranks")

        run = work / "killed"
        with (work / "killed.log").open("wb") as log:
            job = subprocess.Popen(
                [*MPIRUN, LAUNCH, *options(work, "killed")], env=env, stdout=log, stderr=log
            )
            wait_for_step(run, SAVE_STEPS + 2)
            kill(run, 1)
            code = job.wait(timeout=400)
        claims.check(code == 0, f"mpirun ends with {code} after kill -9 of a trainer")
        text = (work / "killed.log").read_text()
        claims.check("killed by signal 9" in text, "the log names the end")
        claims.check("resume" in text, "the run was resumed")
        claims.same(losses(run), two, "after kill -9")

        run = work / "stopped"
        with (work / "stopped.log").open("wb") as log:
            job = subprocess.Popen(
                [*MPIRUN, LAUNCH, *options(work, "stopped")], env=env, stdout=log, stderr=log
            )
            at = wait_for_step(run, SAVE_STEPS + 2)
            job.send_signal(signal.SIGUSR1)  # mpirun forwards it; after SIGTERM it waits only 1 s
            code = job.wait(timeout=200)
        claims.check(code == 75, f"mpirun ends with {code} after SIGUSR1 at step {at}")
        code = finish([*MPIRUN, LAUNCH, *options(work, "stopped")], env, work / "again.log")
        claims.check(code == 0, f"started again it ends with {code}")
        claims.same(losses(run), two, "after SIGUSR1 and a new start")
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


if __name__ == "__main__":
    main()
