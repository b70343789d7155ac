"""scripts/gpu_cases.py without a GPU: what is counted, what is tried, and what a profile says."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from jax_sft import hardware, models, validate
from jax_sft.planning import analysis, step_cost, targets
from jax_sft.training import metrics
from scripts import gpu_case, gpu_cases, gpu_checks, gpu_profile, gpu_step, gpu_torch, stand_ins
from scripts.gpu_cases import Case, Setting
from tests import programs

REPO = Path(__file__).parents[2]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("size", gpu_cases.SHAPES)
def test_flops_are_those_that_the_trainer_counts(size):
    raw = gpu_cases.SHAPES[size]
    family = models.find("qwen2")
    cfg = family.Config.from_hf(raw)
    wanted = metrics.step_flops(
        family.weights(cfg), cfg.axis_sizes, cfg.tied, tokens=1000, pairs=7000
    )
    assert gpu_cases.model_flops(raw, 1000, 7000) == pytest.approx(wanted, rel=1e-12)


def test_every_case_is_there_for_every_size_and_length():
    names = [case.name for case in gpu_cases.CASES]
    assert len(set(names)) == len(names)
    for system in ("ours", "jax_plain", "torch"):
        for size in ("0.5b", "1.5b", "7b"):
            for length in (4096, 32768):
                assert f"{system}/{size}/{length}" in names
    limits = [task.limit_s for task in gpu_cases.tasks(gpu_cases.CASES)]
    assert names[0] == "ours/7b/4096" and all(limits)


def test_the_next_setting_is_tried_where_memory_is_short():
    case = Case("ours", "toy", 128, (Setting(8), Setting(4, {"model.remat": "full"}), Setting(2)))

    def run(case, setting):
        if setting.rows == 8:
            raise MemoryError("RESOURCE_EXHAUSTED")
        return {"tokens": 10, "pairs": 20, "step_time_s": 1.0}

    def is_short(error):
        return isinstance(error, MemoryError)

    first, second = gpu_case.first_that_fits(case, run, is_short)
    assert first["out_of_memory"] == "RESOURCE_EXHAUSTED" and first["rows"] == 8
    assert second["rows"] == 4 and second["settings"] == {"model.remat": "full"}
    flops = gpu_cases.model_flops(gpu_cases.SHAPES["toy"], 10, 20)
    assert second["mfu_c"] == pytest.approx(flops / 989e12)
    short = Case("ours", "toy", 128, (Setting(8),))
    with pytest.raises(MemoryError, match="none of 1 settings of ours/toy/128"):
        list(gpu_case.first_that_fits(short, run, is_short))
    with pytest.raises(MemoryError, match="RESOURCE"):  # another error than that
        list(gpu_case.first_that_fits(short, run, lambda error: False))


def test_a_profile_adds_up():
    events = [
        gpu_profile.Event(0, 10, "sm90_xmma_gemm_bf16", "dot.1"),
        gpu_profile.Event(5, 20, "loop_add_fusion", "add.3"),
        gpu_profile.Event(40, 50, "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", ""),
        gpu_profile.Event(50, 60, "nvjet_tst_128x256", "dot.1"),
    ]
    found = gpu_profile.summary(events, 2, {"dot.1": "jit(train_step)/part.head/dot_general"})
    assert found["busy_ms"] == 40 / 2e6 and found["span_ms"] == 60 / 2e6
    assert list(found["kinds_ms"]) == [
        "matrix products",
        gpu_profile.OTHER,
        "attention",
    ]
    assert found["kernels"][0]["name"] == "loop_add_fusion"
    (head,) = [one for one in found["kernels"] if one["name"].startswith("sm90")]
    assert head["from"].endswith("part.head/dot_general") and head["count"] == 0.5


def test_instructions_are_told_from_the_compiled_text():
    text = """
  %add.3 = f32[] add(%a, %b), metadata={op_name="jit(f)/part.x/add"}
  ROOT dot.1 = f32[] dot(%a), metadata={op_type="dot" op_name="jit(f)/dot"}
"""
    assert gpu_profile.op_names(text) == {"add.3": "jit(f)/part.x/add", "dot.1": "jit(f)/dot"}


def test_torch_attends_within_segments():
    raw = gpu_cases.SHAPES["toy"]
    device = torch.device("cpu")
    assert gpu_torch.error_of_attend(device) == 0.0
    attention, reason = gpu_torch.attention_here(device)
    assert (attention, reason) == (gpu_torch.OWN, "")
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    _, positions = gpu_step.rows_of_segments(2, 24, max_segments=256, median=5)
    inputs = gpu_torch.packed(positions, config.vocab_size, device)
    found = model(**inputs, use_cache=False).logits[0]
    model.set_attn_implementation("sdpa")
    starts = [*np.flatnonzero(positions.reshape(-1) == 0), positions.size]
    for start, stop in zip(starts, starts[1:], strict=False):
        alone = model(inputs["input_ids"][:, start:stop]).logits[0]
        torch.testing.assert_close(found[start:stop], alone, atol=1e-5, rtol=1e-4)


def test_a_machine_without_packages_for_files_can_train(tmp_path):
    out = tmp_path / "out.jsonl"
    hidden = [name for name in stand_ins.NAMES if "." not in name]
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {hidden} else real(name, *a)
sys.argv = ["gpu_case.py", "ours/toy/128", "--out", {str(out)!r}, "--smoke"]
from scripts import gpu_case
from unittest import mock
assert all(isinstance(sys.modules[name], mock.MagicMock) for name in {hidden})
sys.exit(gpu_case.main())
"""
    env = programs.environment(JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (row,) = lines(out)
    assert 5 < row["loss"] < 7 and row["tokens"] == 512 and row["busy_ms"] > 0
    assert row["pairs"] < 512 * 128 / 2 / 2  # packed


def test_the_table_shows_what_was_measured(tmp_path, capsys):
    row = {"task": "ours/7b/4096", "layers": 28, "rows": 3, "tokens": 12288, "attention": "cudnn"}
    row |= {"step_time_s": 0.95, "tokens_per_s": 12934.7, "mfu_c": 0.5634, "peak_bytes": 2**37}
    row |= {"settings": {"model.remat": "full"}}
    row["expected"] = {"step_time_s": 0.9, "peak_bytes": 2**36}
    file = tmp_path / "out.jsonl"
    file.write_text(json.dumps({"task": "machine"}) + "\n" + json.dumps(row) + "\n")
    assert gpu_cases.main(["--table", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[0].count("|") == shown[1].count("|") == shown[2].count("|")
    assert "0.950 | 12,935 | 56.3% | 128.0 | 0.900 | 64.0 | remat=full |" in shown[2]


def test_tasks_run_their_own_scripts(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text("import sys; print(sys.argv)")
    task = gpu_checks.Task("a", "b", 30, {}, script)
    assert gpu_checks.run_all([task], tmp_path / "out.jsonl", budget_s=60, smoke=False) == 0
    assert {task.script for task in gpu_cases.tasks(gpu_cases.CASES)} == {
        gpu_cases.CASE,
        gpu_cases.TORCH,
    }


@pytest.mark.slow
@pytest.mark.skipif(targets.plugin_problem() is not None, reason=str(targets.plugin_problem()))
def test_xla_computes_nothing_twice_where_memory_is_short(tmp_path):
    """120 of 140 GiB: with XLA's own pass fusions appear as NAME.remat and NAME.remat2."""
    case = gpu_cases.find("ours/7b/4096")
    cfg = runpy.run_path(str(gpu_case.config_of(case, case.settings[0], tmp_path)))["get_config"]()
    cfg.batch.rows = case.settings[0].rows
    chip = hardware.find("h200")
    resolved = validate.validate(cfg, 1, planned_for=chip.capability)
    devices = targets.topology(chip, 1, 1)
    where = analysis.Target(chip, 1, 1, devices, step_cost.full_row(case.length))
    found = analysis.analyse(resolved, where, hlo_file=tmp_path / "step.hlo")
    assert "memory" in found and found["memory"]["peak_bytes"] < 121 * 2**30
    assert not re.search(r"%[\w.\-]+\.remat", (tmp_path / "step.hlo").read_text())
