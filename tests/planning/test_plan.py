"""Plans of 7B to 72B models on up to 1024 H200s, compiled here without one, against arithmetic."""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jax_sft import config
from jax_sft import plan as plan_module
from jax_sft.planning import search, targets
from jax_sft.report import plan_page
from tests import programs, tiers

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30

needs_plugin = pytest.mark.skipif(
    targets.plugin_problem() is not None, reason=str(targets.plugin_problem())
)

# Qwen2.5's published sizes: features, mlp, layers, heads, kv heads.
MODELS = {
    "7b": (3584, 18944, 28, 28, 4),
    "32b": (5120, 27648, 64, 40, 8),
    "72b": (8192, 29568, 80, 64, 8),
}
VOCAB, HEAD_DIM = 152_064, 128
# Runs a command and then prints the most memory that it had, in KiB, and its processor seconds.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr)
sys.exit(done.returncode)
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to plan, and the peak that it must stay below."""

    model: str
    hosts: int
    mesh: tuple[int, int, int, int]
    rows: int
    micro_rows: int = 0
    seq_len: int = 4096
    layers: int = 0  # 0 = the model's
    peak_gib: float = 0.0
    changes: tuple[tuple[str, object], ...] = ()


CASES = {
    "7b on 8": Case("7b", 1, (1, 8, 1, 1), 16, 8, peak_gib=25),
    "32b on 8": Case("32b", 1, (1, 8, 1, 1), 8, peak_gib=90),
    "32b on 64": Case("32b", 8, (8, 8, 1, 1), 64, peak_gib=90),
    "72b on 64": Case("72b", 8, (1, 8, 8, 1), 8, peak_gib=40),
    "72b on 1024": Case("72b", 128, (16, 64, 1, 1), 1024, peak_gib=40),
    "131k tokens on 16": Case("7b", 2, (1, 1, 1, 16), 1, seq_len=131_072, peak_gib=60),
}


@functools.cache
def plan_of(case: Case, folder: Path) -> dict:
    """Run the program as a user would, and return its plan.json with its exit code."""
    features, mlp, layers, heads, kv_heads = MODELS[case.model]
    name = f"{case.model}-{len(list(folder.iterdir()))}"
    model = folder / name
    model.mkdir(exist_ok=True)
    config = {
        "model_type": "qwen2",
        "hidden_size": features,
        "intermediate_size": mlp,
        "num_hidden_layers": case.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(config))
    workdir = folder / f"{model.name}-plan"  # outputs do not go into a model's folder
    data, fsdp, tensor, sequence = case.mesh
    lines = [
        "from jax_sft import config",
        "def get_config():",
        "  cfg = config.default()",
        f"  cfg.model.path = {str(model)!r}",
        f"  cfg.data.seq_len = {case.seq_len}",
        f"  cfg.batch.rows, cfg.batch.micro_rows = {case.rows}, {case.micro_rows}",
        f"  cfg.mesh.data, cfg.mesh.fsdp = {data}, {fsdp}",
        f"  cfg.mesh.tensor, cfg.mesh.sequence = {tensor}, {sequence}",
        *(f"  cfg.{key} = {value!r}" for key, value in case.changes),
        "  return cfg",
    ]
    file = folder / f"{name}.py"
    file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "jax_sft.plan", f"--config={file}", "--target=h200"]
    command += [f"--hosts={case.hosts}", f"--workdir={workdir}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    wrapped = [sys.executable, "-c", MEASURED, *command]
    done = subprocess.run(wrapped, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    *_, peak_kib, cpu_s = done.stderr.split()
    assert "Traceback" not in done.stderr, done.stderr
    assert (workdir / "plan.html").exists()
    found = json.loads((workdir / "plan.json").read_text())
    measured = {"exit_code": done.returncode, "printed": done.stdout}
    return found | measured | {"rss_bytes": int(peak_kib) * 1024, "cpu_s": float(cpu_s)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


# Half a minute each, with the axes of other cases.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("32b on 8", "32b on 64")]
FULL = map(tiers.full, ["72b on 64", "72b on 1024", "131k tokens on 16"])


@pytest.fixture(params=["7b on 8", *FULL, *SLOW])
def planned(request, folder):
    case = CASES[request.param]
    return case, plan_of(case, folder)


def num_parameters(case: Case) -> int:
    """Weights of the whole model, biases and norms included."""
    features, mlp, layers, heads, kv_heads = MODELS[case.model]
    qkv = (heads + 2 * kv_heads) * HEAD_DIM
    layer = features * (qkv + heads * HEAD_DIM + 3 * mlp) + qkv + 2 * features
    return (case.layers or layers) * layer + 2 * VOCAB * features + features


def layer_matrices(case: Case) -> int:
    """Elements of the matrices of one layer that a device of `tensor` has, gathered."""
    features, mlp, _, heads, kv_heads = MODELS[case.model]
    return features * ((2 * heads + 2 * kv_heads) * HEAD_DIM + 3 * mlp) // case.mesh[2]


def sent(plan: dict, kind: str, axes: list[str], dtype: str) -> float:
    """Bytes that one device sends in a step, from the arrays of the communication table."""
    total = 0.0
    for row in plan["communication"]:
        if row["kind"] != kind or row["axis"] != axes:
            continue
        members = math.prod(plan["config"]["mesh"][axis] for axis in axes)
        for array in row["arrays"]:
            name, dims = re.fullmatch(r"(\w+)\[(.*)\]", array).groups()
            if name != dtype:
                continue
            size = math.prod(int(n) for n in dims.split(",")) if dims else 1
            size *= {"bf16": 2, "f32": 4, "s32": 4}[dtype]
            whole = size * members if kind == "reduce-scatter" else size
            total += row["count"] * whole * (members - 1) / members
    return total


def embed_axes(case: Case) -> list[str]:
    sizes = dict(zip(("data", "fsdp", "tensor", "sequence"), case.mesh, strict=True))
    return [axis for axis in ("fsdp", "sequence") if sizes[axis] > 1]


@needs_plugin
def test_it_fits_below_the_stated_peak(planned):
    case, plan = planned
    memory = plan["memory"]
    assert plan["exit_code"] == 0 and memory["fits"]
    assert memory["peak_bytes"] < case.peak_gib * GIB
    shards = math.prod(case.mesh[1:])
    # Norms and biases are held whole.
    assert 1 <= memory["parameters"] / (4 * num_parameters(case) / shards) < 1.01
    assert 1 <= memory["moments"] / (8 * num_parameters(case) / shards) < 1.01
    assert memory["arguments"] >= memory["parameters"] + memory["moments"]
    assert "FITS" in plan["printed"]


@needs_plugin
def test_nothing_is_warned_of(planned):
    # No gradient is all-reduced, no scores of T x T or logits of all tokens are held, nothing is
    # rematerialised against its will, nothing large is replicated or multiplied in float32.
    case, plan = planned
    told = [line for line in plan["warnings"] if "no flash kernel" not in line]
    assert told == []
    assert (told == plan["warnings"]) == (case.mesh[3] == 1)  # split rows need tokamax


@needs_plugin
def test_weights_are_gathered_in_bfloat16_twice_and_the_head_once(planned):
    case, plan = planned
    axes = embed_axes(case)
    wanted = moved(case, layer_times=2, itemsize=2)
    if case.mesh[3] > 1:  # keys and values are gathered over `sequence` alone
        wanted += gathered_keys(case)
    assert sent(plan, "all-gather", axes, "bf16") == wanted
    assert sent(plan, "all-gather", axes, "f32") == 0


def moved(case: Case, layer_times: int, itemsize: int) -> float:
    """Bytes that a device sends where every layer's matrices move so often, and the head once."""
    members = case.mesh[1] * case.mesh[3]
    features, _, layers, _, _ = MODELS[case.model]
    elements = layer_times * layers * layer_matrices(case) + VOCAB * features // case.mesh[2]
    micro_batches = case.rows // (case.micro_rows or case.rows)
    return micro_batches * itemsize * elements * (members - 1) / members


def gathered_keys(case: Case) -> float:
    """Keys and values of each row: forward, and once in the backward pass."""
    if embed_axes(case) != ["sequence"]:
        return 0.0
    _, _, layers, _, kv_heads = MODELS[case.model]
    rows = case.rows // (case.mesh[0] * case.mesh[1])
    elements = rows * case.seq_len * 2 * kv_heads // case.mesh[2] * HEAD_DIM
    members = case.mesh[3]
    return 2 * layers * 2 * elements * (members - 1) / members


@needs_plugin
def test_gradients_are_scattered_once_in_float32(planned):
    case, plan = planned
    wanted = moved(case, layer_times=1, itemsize=4)
    assert sent(plan, "reduce-scatter", embed_axes(case), "f32") == wanted


@needs_plugin
def test_most_of_what_is_sent_overlaps_with_compute(planned):
    _, plan = planned
    rows = plan["communication"]
    total = sum(row["fast_bytes"] + row["slow_bytes"] for row in rows)
    hidden = sum(row["fast_bytes"] + row["slow_bytes"] for row in rows if row["overlaps"])
    assert hidden > 0.8 * total


@needs_plugin
def test_the_products_that_were_compiled_are_those_of_the_formula(planned):
    # Forward, backward and recomputation; attention's own loops run as often as the data says.
    _, plan = planned
    arithmetic = plan["arithmetic"]
    assert arithmetic["compiled_gemm_flops"] / arithmetic["hardware_flops"] == pytest.approx(
        1, abs=0.1
    )


@pytest.mark.slow
@needs_plugin
def test_the_program_grows_neither_with_depth_nor_with_devices(folder):
    shallow = plan_of(CASES["7b on 8"], folder)
    deep = plan_of(dataclasses.replace(CASES["7b on 8"], layers=80), folder)
    assert deep["compile"]["hlo_bytes"] == pytest.approx(shallow["compile"]["hlo_bytes"], rel=0.02)
    few = plan_of(
        dataclasses.replace(CASES["72b on 1024"], hosts=16, mesh=(2, 64, 1, 1), rows=128), folder
    )
    many = plan_of(CASES["72b on 1024"], folder)
    assert many["compile"]["hlo_bytes"] == pytest.approx(few["compile"]["hlo_bytes"], rel=0.05)
    for slow, fast in ((deep, shallow), (many, few)):
        assert slow["cpu_s"] < 2 * fast["cpu_s"]  # of all threads: the clock tells of other work


@pytest.mark.slow
@needs_plugin
def test_what_does_not_fit_exits_with_1_and_says_what_would(folder):
    # 32B on one GPU cannot; 7B with all activations kept cannot, with recomputation it does.
    changes = (("model.remat", "none"),)
    case = Case("7b", 1, (1, 8, 1, 1), 64, changes=changes)
    plan = plan_of(case, folder)
    assert plan["exit_code"] == 1 and not plan["memory"]["fits"]
    assert "DOES NOT FIT" in plan["printed"]
    assert "fits" in plan["advice"][0] and "--config.model.remat=" in plan["advice"][0]


@needs_plugin
@pytest.mark.parametrize("remat", ["attention_lse,dots", tiers.full("dots")])
def test_every_policy_is_planned_and_gradients_travel_in_bfloat16_where_asked(folder, remat):
    cfg = small_config(folder, {})
    cfg.model.grad_dtype, cfg.model.remat = "bfloat16", remat
    plan = plan_module.plan(cfg, "h200", hosts=1)
    assert plan["predicted"]["step_time_s"] > 0
    layer, head = 64 * (4 * 8 * 64 + 3 * 512), 64 * 4096
    assert sent(plan, "reduce-scatter", ["fsdp"], "bf16") == 2 * layer * 7 / 8
    assert sent(plan, "reduce-scatter", ["fsdp"], "f32") == 4 * head * 7 / 8


@pytest.mark.slow
@needs_plugin
def test_offloaded_activations_leave_the_device(folder):
    cfg = small_config(folder, {"hidden_size": 512, "num_hidden_layers": 16})
    kept = plan_module.plan(cfg, "h200", hosts=1)["memory"]
    cfg.model.offload = ("residual",)
    moved = plan_module.plan(cfg, "h200", hosts=1)["memory"]
    residuals = 16 * 1024 * 512 * 2
    assert kept["host_bytes"] == 0 and moved["host_bytes"] >= residuals
    assert moved["peak_bytes"] < kept["peak_bytes"] - 0.5 * residuals


@pytest.mark.slow
@needs_plugin
def test_a_search_lists_what_fits_by_predicted_time(folder, monkeypatch):
    monkeypatch.setattr(search, "MOST_COMPILED", 2)
    cfg = small_config(folder, {"hidden_size": 256, "num_hidden_layers": 2})
    found = plan_module.plan(cfg, "h200", hosts=1, with_search=True)["search"]
    assert len(found) == 2
    assert [one["step_time_s"] for one in found] == sorted(one["step_time_s"] for one in found)
    assert all(one["fits"] for one in found)
    assert len({(tuple(one["mesh"].values()), one["remat"]) for one in found}) == len(found)


@pytest.mark.slow
@needs_plugin
def test_a_search_leaves_out_what_cannot_run(folder, monkeypatch):
    # cuDNN's attention, asked for by name, cannot split rows: such meshes are no candidates.
    monkeypatch.setattr(search, "MOST_COMPILED", 2)
    cfg = small_config(folder, {"num_attention_heads": 16, "num_key_value_heads": 2})
    cfg.model.attention, cfg.batch.rows = "cudnn", 2
    cfg.mesh.fsdp, cfg.mesh.tensor, cfg.mesh.data = 2, 2, 2
    cfg.batch.rows = 4
    found = plan_module.plan(cfg, "h200", hosts=1, with_search=True)["search"]
    assert found and all(one["mesh"]["sequence"] == 1 for one in found)


def test_a_search_without_the_plugin_says_what_it_needs(folder, monkeypatch):
    monkeypatch.setattr(targets, "plugin_problem", lambda: "no plugin: pip install it")
    with pytest.raises(ValueError, match="--search needs .* pip install it"):
        plan_module.plan(small_config(folder, {}), "h200", hosts=1, with_search=True)


@pytest.mark.slow
@needs_plugin
def test_float32_is_predicted_to_be_slower_than_bfloat16(folder):
    cfg = small_config(folder, {})
    fast = plan_module.plan(cfg, "h200", hosts=1)["predicted"]["compute"]["mlp"]
    cfg.model.dtype = "float32"
    assert plan_module.plan(cfg, "h200", hosts=1)["predicted"]["compute"]["mlp"] > 1.9 * fast


@pytest.mark.slow
@needs_plugin
def test_the_data_report_of_a_run_lowers_what_is_predicted(folder):
    cfg = small_config(folder, {"hidden_size": 256, "num_hidden_layers": 2})
    whole = plan_module.plan(cfg, "h200", hosts=1)
    counts = {
        **{"kept": 1000, "tokens": 100_000, "trained_tokens": 10_000},
        **{"dropped": {"overlong": 0, "no_trained_token": 0}},
        **{"lengths": {"p5": 50, "p50": 100, "p95": 150, "p99": 180}},
        **{"longest": [{"tokens": 200}]},
    }
    report = folder / "data_report.json"
    report.write_text(json.dumps({"train": {"mine": counts}}))
    plan = plan_module.plan(cfg, "h200", hosts=1, report=report)
    ours, theirs = (one["arithmetic"]["model_flops"] for one in (plan, whole))
    assert ours["head"] == pytest.approx(theirs["head"] / 10)
    assert ours["attention_scores"] < 0.2 * theirs["attention_scores"]
    assert ours["mlp"] == theirs["mlp"]


def small_config(folder: Path, sizes: dict, **changes):
    """A config of a small model in bfloat16 on 8 devices."""
    model = folder / f"small-{len(list(folder.iterdir()))}"
    model.mkdir()
    raw = {
        **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 512},
        **{"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8},
        **{"head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 4096},
    }
    (model / "config.json").write_text(json.dumps(raw | sizes))
    cfg = config.default()
    cfg.model.path = str(model)
    cfg.data.seq_len = 1024
    cfg.batch.rows = 8
    for key, value in changes.items():
        cfg[key] = value
    return cfg


def test_without_the_plugin_the_table_is_that_of_the_partitioned_step(folder, monkeypatch):
    monkeypatch.setattr(targets, "plugin_problem", lambda: "no plugin: pip install it")
    said = []
    cfg = small_config(folder, {})
    plan = plan_module.plan(cfg, "h200", hosts=1, say=said.append)
    assert "pip install" in said[0] and "neither temporaries, peak and verdict" in said[0]
    assert plan["compiled_for"].startswith("cpu") and "memory" not in plan
    text = plan_page.as_text(plan)
    assert "NOT KNOWN" in text
    layer = 64 * (4 * 8 * 64 + 3 * 512)
    head = 4096 * 64
    assert sent(plan, "all-gather", ["fsdp"], "bf16") == 2 * (2 * layer + head) * 7 / 8
    assert sent(plan, "reduce-scatter", ["fsdp"], "f32") == 4 * (layer + head) * 7 / 8


MISTAKES = {
    ("--hosts=0",): "positive",
    ("--target=tpu",): "h200",
    ("--config.mesh.fsdp=3",): "there are 8",
    ("--config.model.path=/nowhere",): "/nowhere",
    ("--config.model.attention=cudnn", "--config.model.dtype=float32"): "cudnn",
    ("--data-report=/nowhere.json",): "/nowhere.json is not a run's data_report.json",
    ("--data-report=README.md",): "README.md is not a run's data_report.json",
    ("--hlo=/nowhere/step.txt",): "no folder /nowhere",
    ("--gpus-per-host=0",): "positive",
}


def test_a_mistake_is_one_line_and_exit_code_64(folder, tmp_path):
    model = small_config(folder, {}).model.path
    base = ["jax_sft.plan", "--config=configs/qwen7b.py", f"--config.model.path={model}"]
    base += [f"--workdir={folder / 'wrong'}"]
    commands = [[*base, *arguments] for arguments in MISTAKES]
    results = programs.run_each(commands, tmp_path)
    for message, done in zip(MISTAKES.values(), results, strict=True):
        assert done.returncode == 64, (done.args, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, done.args
    assert not (folder / "wrong").exists()


@needs_plugin
def test_seven_billion_parameters_are_planned_in_a_minute_and_2_gib(folder):
    # Of the first case, compiled by now or compiled here. Processor seconds, with those of the
    # start: no less than the clock would show where nothing else runs.
    plan = plan_of(CASES["7b on 8"], folder)
    assert plan["rss_bytes"] < 2 * GIB
    assert plan["cpu_s"] < 60
