"""Whole runs: every mesh gives the same numbers, a stopped run goes on bitwise, exports load."""

import ast
import functools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_sft
from jax_sft import config, models
from jax_sft.checkpoint import orbax_io, saving, stop_tokens
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens.prepare import prepare
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.attention import self_test as attention_self_test
from jax_sft.runtime import exit_codes
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import metrics, optim, state
from jax_sft.training.step import value_and_grad
from jax_sft.weights import hf_folder, hf_reader, placement
from tests import programs, sharing, tiers
from tests.inputs import write_config, write_model

MESHES = [
    (1, 2, 2, 2),
    (2, 1, 1, 4),
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 2, 4),
    (2, 2, 2, 1),
    (1, 1, 1, 8),
    (4, 1, 2, 1),
]
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
ROOT = Path(__file__).resolve().parents[2]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def read_metrics(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def on_mesh(cfg, sizes: tuple[int, ...], attention: str = "auto"):
    """Return (model_def, params, loader, mesh) of a config on a mesh of these sizes."""
    mesh = make_mesh(
        dict(zip(rules.AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))]
    )
    folder = Path(cfg.model.path)
    raw = json.loads((folder / "config.json").read_text())
    family = models.find(raw["model_type"])
    model_def = ModelDef.of(
        family,
        family.Config.from_hf(raw),
        dtype=cfg.model.dtype,
        attention=attention,
        remat=cfg.model.remat,
    )
    dims, rows = model_def.cfg.axis_sizes, model_def.specs
    tensors = hf_reader.check(folder, rows, dims, model_def.cfg.tied)
    params = hf_reader.load(
        tensors, rows, dims, placement.shardings(rows, mesh), np.float32, progress=False
    )
    data = config.to_settings(cfg).data
    examples = prepare(data.train, folder, data, progress=False)
    loader = Loader(
        examples,
        data,
        data.train,
        rows=cfg.batch.rows,
        micro_rows=cfg.batch.micro_rows or cfg.batch.rows,
        mesh=mesh,
        shuffle=True,
        seed=0,
    )
    return model_def, params, loader, mesh


def loss_and_grads(cfg, sizes):
    model_def, params, loader, mesh = on_mesh(cfg, sizes)
    with jax.set_mesh(mesh):
        batch = next(loader.batches(0, 1))
        sums, grads = jax.jit(lambda p, b: value_and_grad(model_def, p, b))(params, batch)
        return float(sums["loss"] / sums["weight"]), jax.device_get(grads), grads


FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False},
    "olmo2": {"tie_word_embeddings": False, "attention_bias": True},
    "mistral": {"tie_word_embeddings": True, "sliding_window": 9},  # shorter than most examples
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 7},
    "gemma3_text": {"sliding_window": 9, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 9, "partial_rotary_factor": 0.5},
}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Return a function from a family to (config, loss, gradients) of its model on one device."""

    @functools.cache
    def computed(family: str):
        folder = tmp_path_factory.mktemp(family)
        # Dimensions that 8 divides, so that every mesh is allowed; still all different.
        model = write_model(
            folder,
            model_type=family,
            **{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 24},
            **FAMILIES[family],
        )
        cfg = write_config(folder, model)
        loss, grads, _ = loss_and_grads(cfg, (1, 1, 1, 1))
        return cfg, loss, grads

    return computed


@pytest.mark.parametrize("sizes", [MESHES[0], *map(tiers.full, MESHES[1:])])
# The others are compared with torch, on two meshes, by test_parity.
@pytest.mark.parametrize("family", ["qwen2", *map(SLOW, list(FAMILIES)[1:])])
def test_every_mesh_gives_the_single_device_loss_and_gradients(on_one_device, family, sizes):
    cfg, expected_loss, expected = on_one_device(family)
    loss, grads, _ = loss_and_grads(cfg, sizes)
    assert loss == pytest.approx(expected_loss, rel=1e-5), sizes
    for path, grad in grads.items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=1e-5 * scale + 1e-8)


@pytest.mark.parametrize(
    ("family", "window", "is_tested", "is_capped"),
    [
        ("mistral", 127, True, False),
        ("mistral", 128, False, False),
        ("mistral", None, False, False),
        ("qwen2", 9, False, False),
        ("gemma2", 9, True, True),
    ],
)
def test_attention_is_tested_with_the_window_and_soft_cap_that_the_model_has(
    make_config, make_model, monkeypatch, tmp_path, family, window, is_tested, is_capped
):
    def self_test(name, *, has_window, has_soft_cap, **shape):
        raise InterruptedError(f"{has_window=} {has_soft_cap=}")

    monkeypatch.setattr(attention_self_test, "self_test", self_test)
    cfg = make_config(make_model(model_type=family, sliding_window=window))
    assert cfg.data.seq_len == 128
    with pytest.raises(InterruptedError, match=f"={is_tested} has_soft_cap={is_capped}"):
        jax_sft.train(cfg, tmp_path / "run")


def test_parameters_moments_and_gradients_are_split_over_fsdp_and_tensor(make_config):
    cfg = make_config()
    model_def, params, loader, mesh = on_mesh(cfg, (1, 4, 2, 1))
    tx = optim.make(cfg.optimizer.moments_dtype, model_def.specs)
    with jax.set_mesh(mesh):
        created = state.create(tx, params, model_def.specs, mesh)
    kernel = "layers.mlp.gate.kernel"
    moments = [leaf for leaf in jax.tree.leaves(created.opt_state) if leaf.ndim]
    assert created.params[kernel].sharding.spec == jax.P(None, ("fsdp", "sequence"), "tensor")
    assert len(moments) == 2 * len(params)
    whole = sum(leaf.nbytes for leaf in moments)
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in moments)
    assert here < 1.2 * whole / 8  # all but norms and biases is an eighth


@pytest.mark.full  # test_parity compares micro-batches with one batch of torch
@pytest.mark.parametrize("micro_rows", [8, 16])
def test_accumulation_equals_one_large_batch(make_config, make_model, micro_rows):
    model = make_model(hidden_size=64, head_dim=24)
    large = make_config(model, num_rows=300, **{"batch.rows": 32})
    small = make_config(model, **{"batch.rows": 32, "batch.micro_rows": micro_rows})
    expected_loss, expected, _ = loss_and_grads(large, (1, 8, 1, 1))
    loss, grads, _ = loss_and_grads(small, (1, 8, 1, 1))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(
            grad, expected[path], rtol=0, atol=1e-5 * np.abs(expected[path]).max()
        )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return (config, its metrics when nothing happens, folder of a run that was killed after step
    9 of 12 with step 7 saved, the train step of both).
    """
    folder = tmp_path_factory.mktemp("stopped")
    options = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2, "train.steps": 12}
    cfg = write_config(folder, **options)
    real_add = metrics.Meter.add

    def crash_after_9(meter, *sums):
        real_add(meter, *sums)
        if meter._step == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, sharing.one_program() as built:
        jax_sft.train(cfg, folder / "whole")
        cfg.checkpoint.every_steps = 7
        patch.setattr(metrics.Meter, "add", crash_after_9)
        with pytest.raises(KeyboardInterrupt):
            jax_sft.train(cfg, folder / "parts")
    return cfg, read_metrics(folder / "whole"), folder / "parts", built[0].train_step


def test_the_step_compiles_once(stopped):
    *_, train_step = stopped
    assert train_step._cache_size() == 1  # in two runs


def test_a_stopped_run_goes_on_with_bitwise_the_same_losses(stopped, tmp_path):
    cfg, expected, parts, _ = stopped
    run = Path(shutil.copytree(parts, tmp_path / "run"))
    jax_sft.train(cfg, run)  # steps 8 and 9 are done again
    found = read_metrics(run)
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch")
    assert [[m[k] for k in keys] for m in found] == [[m[k] for k in keys] for m in expected]
    assert [m["step"] for m in found] == list(range(1, 13))


def train_until_saved(cfg, workdir: Path) -> None:
    """Train until the first checkpoint is there."""
    with pytest.MonkeyPatch.context() as patch:
        real_save = saving.Checkpoints.save

        def save_and_stop(checkpoints, *args, **options):
            real_save(checkpoints, *args, **options)
            checkpoints.close()
            raise KeyboardInterrupt

        patch.setattr(saving.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            jax_sft.train(cfg, workdir)


def test_a_run_resumes_on_another_mesh_to_rounding(stopped, tmp_path):
    cfg, lines, parts, _ = stopped
    run = Path(shutil.copytree(parts, tmp_path / "run"))
    other = cfg.copy_and_resolve_references()
    other.mesh.fsdp, other.mesh.tensor, other.mesh.sequence = 8, 1, 1
    jax_sft.train(other, run)  # steps 8 to 12
    expected = {m["step"]: m["loss"] for m in lines}
    found = {m["step"]: m["loss"] for m in read_metrics(run)}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [SLOW(True), False])
def test_a_vocabulary_that_the_mesh_does_not_divide_changes_nothing(
    make_config, make_model, tmp_path, capsys, tied
):
    model = make_model(
        **{"model_type": "gemma2", "vocab_size": 269, "tie_word_embeddings": tied},
        **{"num_hidden_layers": 1, "num_key_value_heads": 4, "final_logit_softcapping": 2.0},
    )

    def cfg(tensor: int, **changes):
        changes |= {"mesh.tensor": tensor, "mesh.fsdp": 8 // tensor, "train.export": True}
        changes |= {"loss.label_smoothing": 0.1, "loss.z_loss": 1e-2, "train.steps": 6}
        made = make_config(model, **changes, **{"eval.at_start": False})
        made.data.eval.held = config.source(made.data.train.main.path, limit=10)
        return made

    expected = jax_sft.train(cfg(1), tmp_path / "whole")
    parts = tmp_path / "parts"
    assert "padded" not in capsys.readouterr().out
    if not tied:
        train_until_saved(cfg(4, **{"checkpoint.every_steps": 3}), parts)
        assert "padded  vocabulary 269 -> 272 for mesh.tensor = 4" in capsys.readouterr().out
    found = jax_sft.train(cfg(2), parts)
    assert "padded  vocabulary 269 -> 270 for mesh.tensor = 2" in capsys.readouterr().out
    for key in ("loss", "grad_norm", "eval/loss", "eval/accuracy"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    losses = ([m["loss"] for m in read_metrics(folder)] for folder in (tmp_path / "whole", parts))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # What was exported has no padding, and gives the same on every mesh.
    tokens, prompts = np.arange(40).reshape(2, 20), [[3, 1, 4], [260]]
    one = jax_sft.load(parts / "export")
    two = jax_sft.load(parts / "export", make_mesh({"fsdp": 2, "tensor": 4}))
    assert one.logits(tokens).shape == two.logits(tokens).shape == (2, 20, 269)
    np.testing.assert_allclose(one.logits(tokens), two.logits(tokens), rtol=0, atol=1e-5)
    assert one.greedy(prompts, 4, []) == two.greedy(prompts, 4, [])


def test_a_run_leaves_what_it_promises_and_its_export_loads(make_config, tmp_path, capsys):
    cfg = make_config(**{"train.export": True, "train.steps": 3, "eval.every_steps": 2})
    cfg.data.eval.held = config.source(cfg.data.train.main.path, limit=10)
    cfg.eval.samples = 2
    last = jax_sft.train(cfg, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.json", "metrics.jsonl", "data_report.json", "checkpoints", "export"}
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "eval/loss" in m] == [0, 2, 3]
    assert last["step"] == 3 and "eval/held/exact_match" in last
    tokens = np.arange(40).reshape(2, 20)
    exported = jax_sft.load(tmp_path / "run" / "export").logits(tokens)
    before = jax_sft.load(cfg.model.path).logits(tokens)
    assert exported.shape == (2, 20, 272)
    assert np.abs(np.asarray(exported) - np.asarray(before)).max() > 1e-3
    printed = capsys.readouterr().out
    assert "ETA" in printed and "trained tok/s" in printed
    assert "turns with '<|im_end|>' (258, 60 turns); the export will stop at the latter" in printed
    generation = json.loads((tmp_path / "run/export/generation_config.json").read_text())
    assert generation == {"do_sample": False, "eos_token_id": 258}
    # Another run that starts from these checkpoints stops there, too.
    kept = hf_folder.resolve(str(tmp_path / "run/checkpoints"))
    assert stop_tokens.inherited(kept) == {258: 60} and stop_tokens.inherited(tmp_path) == {}


def test_a_state_that_is_not_finite_is_never_saved(make_config, tmp_path):
    cfg = make_config(**{"optimizer.learning_rate": 1e30, "optimizer.warmup": 0.0})
    cfg.log.every_steps, cfg.checkpoint.every_steps = 10, 5
    with pytest.raises(FloatingPointError, match="3 such step.s. in a row"):
        jax_sft.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "5").exists()


def test_a_run_goes_on_when_saves_fail_and_says_at_its_end_what_is_not_saved(
    make_config, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise orbax_io.Failed("OSError: No space left on device")

    monkeypatch.setattr(orbax_io, "start_saving", fail)
    monkeypatch.setattr(saving, "PAUSES_S", (0, 0, 0))
    cfg = make_config(**{"train.steps": 3, "checkpoint.every_steps": 1})
    with pytest.raises(saving.NotSaved, match="step 3 could not be saved") as ended:
        jax_sft.train(cfg, tmp_path / "run")
    assert exit_codes.of(ended.value) == exit_codes.NOT_SAVED
    assert capsys.readouterr().out.count("No space left on device") == 5  # the last one 3 times
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    cfg.checkpoint.every_steps = 0
    assert jax_sft.train(cfg, tmp_path / "run")["step"] == 3  # all again, from the beginning


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (config, folder) of a run of 3 steps."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = write_config(folder, **{"train.steps": 3})
    jax_sft.train(cfg, folder / "run")
    return cfg, folder / "run"


@pytest.fixture
def finished(trained, tmp_path):
    """Return the config and the folder of a run of 3 steps, which the test may change."""
    cfg, run = trained
    return cfg.copy_and_resolve_references(), Path(shutil.copytree(run, tmp_path / "run"))


def test_a_run_with_another_config_or_data_is_refused_before_weights_are_read(
    finished, monkeypatch
):
    cfg, run = finished
    monkeypatch.setattr(hf_reader, "load", None)
    cfg.train.steps, cfg.optimizer.learning_rate = 6, 1e-5
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 1e-05\n  train.steps: 3 -> 6\n"):
        jax_sft.train(cfg, run)
    cfg.optimizer.learning_rate, cfg.checkpoint.allow_changes = 1e-3, ("train.steps",)
    data = Path(cfg.data.train.main.path)
    text = data.read_text()
    data.write_text(text.replace("count", "list"))
    with pytest.raises(ValueError, match="data: the files are not those of the checkpoint"):
        jax_sft.train(cfg, run)
    data.write_text(text)
    assert jax_sft.train(cfg, run)["step"] == 6


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path, capsys):
    cfg, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert jax_sft.train(cfg, run) == {}
    said = capsys.readouterr().out
    assert "step 3 of 3 is already there: nothing was trained or written" in said
    assert "--config.train.steps=6 --config.checkpoint.allow_changes=\"('train.steps',)\"" in said
    assert "saved" not in said
    # What an unfinished run refuses, this one does, and leaves all as it was.
    other = Path(shutil.copytree(cfg.model.path, tmp_path / "other"))
    for key, value in (
        *(("optimizer.learning_rate", 2.0), ("model.path", str(other)), ("train.steps", 2)),
        ("data.seq_len", 64),
    ):
        changed = cfg.copy_and_resolve_references()
        group, leaf = key.split(".")
        changed[group][leaf] = value
        with pytest.raises(ValueError, match=f"differs in\n  {key}: "):
            jax_sft.train(changed, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    shorter = cfg.copy_and_resolve_references()
    shorter.train.steps, shorter.checkpoint.allow_changes = 2, ("train.steps",)
    assert jax_sft.train(shorter, run) == {}
    assert "step 3 of 2 is already there" in capsys.readouterr().out
    for option in shlex.split(said.partition("the same command with ")[2]):  # as it was advised
        key, value = option.removeprefix("--config.").split("=")
        group, leaf = key.split(".")
        cfg[group][leaf] = ast.literal_eval(value)
    assert jax_sft.train(cfg, run)["step"] == 6


def test_the_command_line_trains_overrides_keys_and_exports(make_config, tmp_path):
    cfg = make_config()
    file = tmp_path / "my_config.py"
    file.write_text(
        "from jax_sft import config\n\n\ndef get_config():\n"
        "    cfg = config.default()\n"
        f"    cfg.model.path = {cfg.model.path!r}\n"
        "    cfg.model.dtype = 'float32'\n"
        f"    cfg.data.train.main = config.source({cfg.data.train.main.path!r})\n"
        "    cfg.data.seq_len = 128\n    cfg.batch.rows = 8\n"
        "    cfg.optimizer.learning_rate = 1e-3\n    return cfg\n"
    )
    run = tmp_path / "run"
    base = ["jax_sft.train", f"--config={file}", f"--workdir={run}"]
    # As many as in other runs of this file: the step may be compiled already.
    base += ["--config.train.steps=3", "--config.train.epochs=3"]
    trained = subprocess.run([sys.executable, "-m", *base], cwd=ROOT, text=True, **PIPES)
    assert trained.returncode == 0, trained.stderr
    assert "step 3/3" in trained.stdout
    out = tmp_path / "out"
    export = ["jax_sft.export", f"--checkpoint={run}/checkpoints", f"--out={out}"]
    commands = [[*base, "--config.model.remat=ful"], [*export, "--shard-size=50KB"], export]
    wrong, exported, again = programs.run_each(commands, tmp_path)
    assert wrong.returncode == 64
    assert "model.remat = 'ful'" in wrong.stderr and "Traceback" not in wrong.stderr
    assert exported.returncode == 0, exported.stderr
    assert (out / "model.safetensors.index.json").exists()
    assert again.returncode == 64 and "not empty" in again.stderr


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(make_config, tmp_path):
    cfg = make_config(**{"train.steps": 4})
    file = tmp_path / "two.py"
    file.write_text(
        "from jax_sft import config\n\n\ndef get_config():\n"
        "    cfg = config.default()\n"
        f"    cfg.model.path = {cfg.model.path!r}\n"
        "    cfg.model.dtype = 'float32'\n"
        f"    cfg.data.train.main = config.source({cfg.data.train.main.path!r})\n"
        "    cfg.data.seq_len = 128\n    cfg.batch.rows = 8\n    cfg.train.steps = 4\n"
        "    cfg.log.every_steps = 1\n    cfg.mesh.fsdp = 4\n    cfg.mesh.cpu_devices = 4\n"
        "    return cfg\n"
    )
    env = programs.environment(PYTHON=sys.executable)
    for nproc in (1, 2):
        run = tmp_path / f"run{nproc}"
        command = ["scripts/launch.sh", f"--nproc={nproc}", f"--config={file}", f"--workdir={run}"]
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, **PIPES)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_metrics(tmp_path / f"run{n}") for n in (1, 2))
    assert [m["step"] for m in two] == [1, 2, 3, 4]
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=1e-5)
