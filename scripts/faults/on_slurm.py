"""Real Slurm on this machine, two nodes: two tasks equal one process, a killed one resumes, and the
ready job queues itself again.

    python scripts/faults/on_slurm.py

As root, with the Debian packages slurm-wlm and munge. About 6 minutes on 2 cores.
"""

import subprocess
import time
from pathlib import Path

import slurm_here
from twenty_steps import (
    LAUNCH,
    ROOT,
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
    wait_until,
    workplace,
)

SRUN = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1"]
# What the ready job asks for, cut down to this machine.
SMALL = ["--gpus-per-node=0", "--nodes=2", "--time=00:10:00"]


def submit(work: Path, run: str, env: dict[str, str], *arguments: str) -> str:
    """Submit the ready job; return its number."""
    command = ["sbatch", "--parsable", *SMALL, f"--output={work}/{run}.log", *arguments]
    command += [str(ROOT / "scripts" / "slurm.sbatch"), *options(work, run)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def shown(job: str) -> dict[str, str]:
    """Return what Slurm says about a job."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)


def wait_for_end(job: str, timeout_s: float = 400) -> dict[str, str]:
    """Wait until a job is neither queued nor running; return what Slurm says about it."""
    active = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
    wait_until(lambda: shown(job)["JobState"] not in active, f"end of job {job}", timeout_s)
    slurm_here.wait_for_idle()
    return shown(job)


def main() -> None:
    """The command line."""
    need("slurmctld", "slurmd", "srun", "munged", packages=slurm_here.PACKAGES)
    slurm_here.in_own_mounts()
    claims = Claims()
    with workplace("slurm") as work, slurm_here.cluster():
        env = environment(work)
        expected = alone(work)
        code = finish([*SRUN, LAUNCH, *options(work, "two")], env, work / "two.log")
        claims.check(code == 0, f"srun of two tasks on two nodes ends with {code}")
        two = losses(work / "two")
        claims.equal(two, expected, "two tasks")

        forgotten = [*("salloc", "-N2", "-Q"), LAUNCH, *options(work, "forgotten")]
        code = finish(forgotten, env, work / "forgotten.log")
        text = (work / "forgotten.log").read_text()
        claims.check(code == 64 and "srun" in text, f"two nodes without srun: {text.strip()!r}")

        job = submit(work, "trainer", env)
        at = wait_for_step(work / "trainer", SAVE_STEPS + 2)
        kill(work / "trainer", 1)
        found = wait_for_end(job)
        claims.check(found["JobState"] == "COMPLETED", f"job ends {found['JobState']}")
        claims.check(
            found["Restarts"] == "0", f"within the same job ({found['Restarts']} requeues)"
        )
        claims.same(losses(work / "trainer"), two, f"kill -9 of a trainer at step {at}")

        job = submit(work, "launcher", env)
        at = wait_for_step(work / "launcher", SAVE_STEPS + 2)
        kill(work / "launcher", 1, "jax_sft.launch")
        found = wait_for_end(job)
        claims.check(found["JobState"] == "COMPLETED", f"job ends {found['JobState']}")
        claims.same(losses(work / "launcher"), two, f"kill -9 of a task (launcher) at step {at}")

        job = submit(work, "preempted", env)
        at = wait_for_step(work / "preempted", SAVE_STEPS + 2)
        subprocess.run(["scancel", "--signal=TERM", job], check=True)  # as --signal does
        found = wait_for_end(job)
        claims.check(found["JobState"] == "COMPLETED", f"job ends {found['JobState']}")
        claims.check(found["Restarts"] == "1", f"requeued by itself {found['Restarts']} time")
        claims.same(losses(work / "preempted"), two, f"SIGTERM to the job at step {at}")

        job = submit(work, "cancelled", env)
        wait_for_step(work / "cancelled", SAVE_STEPS + 2)
        subprocess.run(["scancel", job], check=True)
        found = wait_for_end(job)
        time.sleep(10)  # the delay of a requeue
        found = shown(job)
        claims.check(found["JobState"] == "CANCELLED", f"a cancelled job is {found['JobState']}")

        code = subprocess.run(
            ["sbatch", "-W", *SMALL, f"--output={work}/wrong.log", "scripts/slurm.sbatch"]
            + [*options(work, "wrong"), "--config.model.remat=ful"],
            **{"cwd": ROOT, "env": env, "capture_output": True},
        ).returncode
        claims.check(code == 64, f"a wrong config ends the job with {code}, at once")
        if claims.failed:
            print(f"the logs stay in {work}")
            claims.end()


if __name__ == "__main__":
    main()
