"""Check runs under real Slurm on this machine, with two nodes.

    python scripts/faults/on_slurm.py

Two tasks have to equal one process, a killed task has to resume, and scripts/slurm.sbatch has to
queue itself again. Run it as root, with the Debian packages slurm-wlm and munge. About 6 minutes on
2 cores.
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
# Options that reduce the resources of scripts/slurm.sbatch to this machine.
SMALL = ["--gpus-per-node=0", "--nodes=2", "--time=00:10:00"]


def submit(work: Path, run: str, env: dict[str, str], *arguments: str) -> str:
    """Submit scripts/slurm.sbatch; return the number of the job."""
    command = ["sbatch", "--parsable", *SMALL, f"--output={work}/{run}.log", *arguments]
    command += [str(ROOT / "scripts" / "slurm.sbatch"), *options(work, run)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def shown(job: str) -> dict[str, str]:
    """Return {field: value} of a job from scontrol."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)


def wait_for_end(job: str, timeout_s: float = 400) -> dict[str, str]:
    """Wait until a job is neither queued nor running; return its fields from scontrol."""
    active = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
    wait_until(lambda: shown(job)["JobState"] not in active, f"end of job {job}", timeout_s)
    slurm_here.wait_for_idle()
    return shown(job)


def main() -> None:
    """Run all checks."""
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

        without_srun = [*("salloc", "-N2", "-Q"), LAUNCH, *options(work, "forgotten")]
        code = finish(without_srun, env, work / "forgotten.log")
        text = (work / "forgotten.log").read_text()
        claims.check(code == 64 and "srun" in text, f"two nodes without srun: {text.strip()!r}")

        job = submit(work, "trainer", env)
        at = wait_for_step(work / "trainer", SAVE_STEPS + 2)
        kill(work / "trainer", 1)
        fields = wait_for_end(job)
        claims.check(fields["JobState"] == "COMPLETED", f"job ends {fields['JobState']}")
        claims.check(
            fields["Restarts"] == "0", f"within the same job ({fields['Restarts']} requeues)"
        )
        claims.same(losses(work / "trainer"), two, f"kill -9 of a trainer at step {at}")

        job = submit(work, "launcher", env)
        at = wait_for_step(work / "launcher", SAVE_STEPS + 2)
        kill(work / "launcher", 1, "jax_sft.launch")
        fields = wait_for_end(job)
        claims.check(fields["JobState"] == "COMPLETED", f"job ends {fields['JobState']}")
        claims.same(losses(work / "launcher"), two, f"kill -9 of a task (launcher) at step {at}")

        job = submit(work, "preempted", env)
        at = wait_for_step(work / "preempted", SAVE_STEPS + 2)
        subprocess.run(["scancel", "--signal=TERM", job], check=True)  # as --signal does
        fields = wait_for_end(job)
        claims.check(fields["JobState"] == "COMPLETED", f"job ends {fields['JobState']}")
        claims.check(fields["Restarts"] == "1", f"requeued by itself {fields['Restarts']} time")
        claims.same(losses(work / "preempted"), two, f"SIGTERM to the job at step {at}")

        job = submit(work, "cancelled", env)
        wait_for_step(work / "cancelled", SAVE_STEPS + 2)
        subprocess.run(["scancel", job], check=True)
        fields = wait_for_end(job)
        time.sleep(10)  # the delay of a requeue
        fields = shown(job)
        claims.check(fields["JobState"] == "CANCELLED", f"a cancelled job is {fields['JobState']}")

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
