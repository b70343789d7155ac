"""The ready Slurm job, with programs in the place of Slurm's: when it queues itself again."""

import os
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).resolve().parents[2] / "scripts" / "slurm.sbatch"
SRUN = """#!/bin/sh
count=$(cat count 2>/dev/null || echo 0) # of the starts before
echo $((count + 1)) > count
set -- {ends}
shift $count
echo "$1" | cut -d: -f2- | tr _ ' '
exit "${{1%%:*}}"
"""
SCONTROL = """#!/bin/sh
case $1 in
  show) echo "JobId=7 JobState={state} Restarts=0 " ;;
  requeue) echo "requeued" ;;
esac
"""
OTHERS_ERROR = "launch:_process_1_on_b_ended_first:_exit_code_{}:_why"


@pytest.fixture
def run(tmp_path):
    """Run the job; `ends` are the exit code of each srun and what it prints."""

    def run(*ends: str, state: str = "RUNNING", **variables: str) -> tuple[int, str]:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        words = " ".join(f"'{end}'" for end in ends)
        for name, text in (
            ("srun", SRUN.format(ends=words)),
            ("scontrol", SCONTROL.format(state=state)),
            ("sleep", "#!/bin/sh\n"),
        ):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        with (tmp_path / "job log").open("ab") as log:
            done = subprocess.run(
                ["bash", JOB], cwd=tmp_path, env=env | variables, stdout=log, stderr=log
            )
        return done.returncode, (tmp_path / "job log").read_text()

    return run


@pytest.mark.parametrize("code", [0, 64, 65, 74])
def test_what_no_restart_would_help_ends_the_job_with_its_code(run, code):
    found, log = run(f"{code}:")
    assert found == code and "requeued" not in log and f"srun ended with {code}" in log


def test_a_job_that_saved_is_queued_again_and_ends_well(run):
    found, log = run("75:launch: asked to stop")
    assert found == 0 and "requeued" in log


@pytest.mark.parametrize("code", [64, 65, 74])
def test_an_error_on_one_host_ends_the_job_though_the_others_were_told_to_stop(run, code):
    found, log = run(f"75:{OTHERS_ERROR.format(code)}")
    assert found == code and "requeued" not in log


def test_an_error_of_an_earlier_start_of_the_job_does_not_count(run, tmp_path):
    (tmp_path / "job log").write_text(OTHERS_ERROR.format(64).replace("_", " ") + "\n")
    assert run("75:")[0] == 0


def test_a_crash_is_tried_again_within_the_job_and_then_given_up(run, tmp_path):
    assert run("76:", "139:", "0:")[0] == 0
    (tmp_path / "count").unlink()
    found, log = run("76:", "76:", "76:", "76:", "0:")
    assert found == 76 and "giving up" in log and "requeued" not in log


def test_a_cancelled_job_is_not_queued_again(run):
    found, log = run("75:", state="CANCELLED")
    assert found == 75 and "requeued" not in log


def test_a_job_does_not_queue_itself_again_for_ever(run):
    found, log = run("75:", SLURM_RESTART_COUNT="100")
    assert found == 75 and "requeued" not in log and "giving up" in log
