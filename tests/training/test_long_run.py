"""A long run: its memory does not grow, and what it writes is bounded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10_000
TRAINER = """
from pathlib import Path
from jax_sft import config, train
from jax_sft.files.run_files import Jsonl
cfg = config.default()
cfg.update({changes!r})
cfg.data.train.main = config.source({data!r})
cfg.data.eval.main = config.source({data!r})
found = open({found!r}, "w")
log = Jsonl.log
def with_memory(tracker, step, metrics):
    status = Path("/proc/self/status").read_text()
    found.write(f"{{step}} {{status.split('VmRSS:')[1].split()[0]}}\\n")
    log(tracker, step, metrics)
Jsonl.log = with_memory
train.train(cfg, {workdir!r})
"""


@pytest.mark.slow  # some minutes
def test_memory_is_flat_over_10_000_steps_and_the_logs_are_bounded(make_config, tmp_path):
    cfg = make_config()
    changes = {
        "model": {"path": cfg.model.path, "dtype": "float32"},
        "data": {"seq_len": 128},
        "batch": {"rows": 2},
        "train": {"steps": STEPS},
        "log": {"every_steps": 50},
        "eval": {"every_steps": 1000},
        "checkpoint": {"every_steps": 500, "keep": 2},
    }
    trainer = TRAINER.format(
        changes=changes,
        data=cfg.data.train.main.path,
        found=str(tmp_path / "memory"),
        workdir=str(tmp_path / "run"),
    )
    with (tmp_path / "log").open("w") as log:
        env = programs.environment(PYTHONPATH=str(ROOT))
        subprocess.run([sys.executable, "-c", trainer], check=True, stdout=log, stderr=log, env=env)
    resident = {}
    for line in (tmp_path / "memory").read_text().splitlines():
        step, kib = map(int, line.split())
        resident.setdefault(step // 1000, []).append(kib / 1024)
    # The largest of each thousand steps: saves and evaluations come and go.
    most = [max(resident[thousand]) for thousand in range(10)]
    print("MiB resident, most of each 1,000 steps:", [round(mib) for mib in most])
    assert most[9] - most[1] < 16, most
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS / 50 + STEPS / 1000 + 1  # steps and evaluations
    assert json.loads(lines[-1])["step"] == STEPS
    assert len((tmp_path / "log").read_text().splitlines()) < STEPS / 50 + 200
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2 + 1  # and model_files
