"""Speed, MFU and the line on the screen; trackers; evaluation."""

import errno
import json
import math
import os
import re
import shutil
import struct
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jax_sft
from jax_sft import models, settings, tiny
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.data.chat import encoding
from jax_sft.data.sources import formats
from jax_sft.data.tokens.prepare import prepare
from jax_sft.files import run_files
from jax_sft.models import qwen2
from jax_sft.nn.model_def import ModelDef
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import evaluate, metrics, trackers
from jax_sft.training.step import make_eval_step, no_sums
from jax_sft.validate import validate
from jax_sft.weights import hf_folder, hf_reader, placement

# ---- FLOPs ---------------------------------------------------------------------------------------

SIZES = {
    **{"model_type": "qwen2", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_step_equal_the_hand_count(tied):
    cfg = qwen2.Config.from_hf(SIZES | {"tie_word_embeddings": tied})
    # q and out 16 x 16, k and v 16 x 8, gate, up and down 16 x 24, in each layer; head 100 x 16.
    per_token = 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 100 * 16
    # A pair is a product of queries and keys and one of probabilities and values: 4 heads of 4.
    per_pair = 3 * 2 * (4 * 4)
    tokens, pairs = 70.0, 500.0
    forward = 2 * per_token * tokens + 2 * per_pair * pairs
    found = metrics.step_flops(qwen2.weights(cfg), cfg.axis_sizes, tied, tokens, pairs)
    assert found == 3 * forward


@pytest.mark.parametrize(
    ("kinds", "peak"),
    [
        (["NVIDIA H100 80GB HBM3"] * 2, 2 * 989e12),
        (["NVIDIA H200"], 989e12),
        (["NVIDIA H100 PCIe"], 756e12),
        (["NVIDIA A100-SXM4-80GB"], 312e12),
        (["NVIDIA H200", "NVIDIA B200"], 3239e12),
        (["NVIDIA H200", "cpu"], None),
    ],
)
def test_the_peak_is_known_for_every_device_or_for_none(kinds, peak):
    assert metrics.peak_flops([SimpleNamespace(device_kind=kind) for kind in kinds]) == peak


# ---- the meter -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when told; `clock[0]` is the time."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def make_meter(**changes) -> metrics.Meter:
    options = {
        **{"every_steps": 10, "num_steps": 100, "epoch_of": lambda step: step / 40},
        **{"flops": lambda sums: 10 * sums["tokens"], "peak": 1e4, "start_step": 0},
    }
    return metrics.Meter(**options | changes)


def sums(**changes) -> dict[str, np.ndarray]:
    values = {"loss": 120.0, "weight": 60.0, "correct": 30.0, "tokens": 150.0, "pairs": 900.0}
    values |= {"grad_norm": 2.0, "learning_rate": 1e-5, "skipped": 0.0} | changes
    return {key: np.float32(value) for key, value in values.items()}


def test_the_meter_averages_speed_over_its_window_and_shows_the_last_loss(clock):
    meter = make_meter()
    for step in range(1, 11):
        assert not meter.due
        meter.add(sums(tokens=100 if step % 2 else 200, loss=120 if step < 10 else 240), 200)
        clock[0] += 0.5
    assert meter.due
    found = meter.read()
    assert not meter.due
    assert found == pytest.approx(
        {
            **{"step": 10, "epoch": 0.25, "loss": 4.0, "learning_rate": 1e-5, "grad_norm": 2.0},
            **{"tokens_per_s": 300.0, "trained_tokens_per_s": 120.0, "fill": 0.75},
            **{"step_time_s": 0.5, "data/wait_ms": 0.0, "mfu": 0.3},
        }
    )
    line = meter.line(found)
    assert "step 10/100" in line and "MFU 30.0%" in line and "ETA 45s" in line


def test_waiting_for_data_is_averaged_and_shown_only_when_it_slows_down(clock):
    meter = make_meter(every_steps=4)
    lines = []
    for wait_ms in (1.0, 100.0):
        for _ in range(4):
            meter.add(sums(), 200, wait_ms)
            clock[0] += 1
        found = meter.read()
        assert found["data/wait_ms"] == wait_ms  # nothing is left of the window before
        lines.append(meter.line(found))
    assert "WAITING" not in lines[0] and "WAITING FOR DATA 100 ms/step" in lines[1]


def test_fill_counts_the_batch_as_it_was_built(clock):
    meter = make_meter(every_steps=2)
    meter.add(sums(tokens=100), 100)  # batches of two buckets
    meter.add(sums(tokens=100), 300)
    clock[0] += 1
    assert meter.read()["fill"] == 0.5


def test_the_loss_of_each_source_is_its_own_mean_and_left_out_where_it_has_none(clock):
    meter = make_meter(every_steps=1, sources=("chat", "code", "math"))
    of_sources = {
        "loss_by_source": np.float32([6.0, 0.0, 0.5]),
        "weight_by_source": np.float32([3.0, 0.0, 0.25]),
    }
    meter.add(sums(loss=6.5, weight=3.25) | of_sources, 200)
    clock[0] += 1
    found = meter.read()
    assert found["loss/chat"] == 2.0 and found["loss/math"] == 2.0 and "loss/code" not in found
    assert found["loss"] == 2.0


def test_a_batch_of_less_than_one_weight_still_has_a_mean_loss(clock):
    meter = make_meter(every_steps=1)
    meter.add(sums(loss=0.5, weight=0.25), 200)
    clock[0] += 1
    assert meter.read()["loss"] == 2.0


def test_the_meter_counts_steps_from_where_the_run_resumed(clock):
    meter = make_meter(start_step=95, peak=None)
    for _ in range(5):
        meter.add(sums(), 200)
        clock[0] += 2
    assert meter.due  # the last step of the run, though not a tenth one
    found = meter.read()
    assert found["step"] == 100 and found["step_time_s"] == 2 and "mfu" not in found


def test_time_of_an_evaluation_between_two_readings_is_left_out(clock):
    meter = make_meter(every_steps=1)
    meter.add(sums(), 200)
    clock[0] += 1
    meter.read()
    with meter.paused():
        clock[0] += 500
    meter.add(sums(), 200)
    clock[0] += 1
    assert meter.read()["step_time_s"] == 1


def test_time_of_an_evaluation_within_a_window_is_left_out(clock):
    meter = make_meter()
    for step in range(1, 11):
        meter.add(sums(), 200)
        clock[0] += 1
        if step == 5:  # eval.every_steps = 5, log.every_steps = 10
            with meter.paused():
                clock[0] += 500
    assert meter.read()["step_time_s"] == pytest.approx(1)


def test_every_step_is_observed_once_and_in_order(clock):
    seen = []
    meter = make_meter(observe=lambda step, sums: seen.append((step, float(sums["loss"]))))
    for step in range(1, 11):
        meter.add(sums(loss=step), 200)
        clock[0] += 1
        if step in (4, 6):
            meter.check()
    meter.read()
    assert seen == [(step, step) for step in range(1, 11)]


def test_a_step_that_was_not_applied_is_not_in_the_metrics(clock):
    meter = make_meter(every_steps=3)
    bad = sums(loss=math.nan, weight=math.inf, grad_norm=math.nan, skipped=1.0)
    for one in (sums(loss=60), sums(loss=240), bad):
        meter.add(one, 200)
        clock[0] += 1
    found = meter.read()
    assert (found["loss"], found["grad_norm"], found["tokens_per_s"]) == (4.0, 2.0, 100.0)
    for _ in range(3):
        meter.add(bad, 200)
        clock[0] += 1
    found = meter.read()
    assert math.isnan(found["loss"]) and found["tokens_per_s"] == 0


def test_a_batch_without_a_trained_token_has_loss_zero(clock):
    meter = make_meter(every_steps=1)
    meter.add(sums(loss=0, weight=0, correct=0), 200)
    clock[0] += 1
    assert meter.read()["loss"] == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0"), (950, "950"), (1000, "1k"), (12_345, "12.3k"), (4_560_000, "4.56M")],
        *[(7_610_000_000, "7.61B"), (999.6, "1k"), (999.4, "999")],
    ],
)
def test_counts_are_short(number, text):
    assert metrics.count(number) == text


@pytest.mark.parametrize(("number", "text"), [(999_600, "1M"), (999_999_999, "1B")])
def test_counts_just_below_a_unit_have_no_exponent(number, text):
    assert metrics.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42.4, "42s"), (59.6, "1m00s"), (185, "3m05s"), (3599.9, "1h00m"), (7640, "2h07m")],
)
def test_durations_are_short(seconds, text):
    assert metrics.duration(seconds) == text


# ---- trackers ------------------------------------------------------------------------------------


def test_jsonl_drops_lines_of_a_lost_run_and_goes_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (0, 10, 20, 30)]
    file.write_text("\n".join(lines) + '\n{"step": 40, "lo')  # cut short by a crash
    tracker = run_files.Jsonl(file, start_step=20)
    tracker.log(25, {"loss": 1.0})
    assert len(file.read_text().splitlines()) == 4  # on disk at once
    tracker.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in found] == [0, 10, 20, 25]
    assert found[-1] == {"step": 25, "loss": 1.0}


@pytest.mark.parametrize(
    "rest", ["", "\n", "\x00\x00\x00", "3\n", '{"loss": 1}\n', "null\n", '{"st']
)
def test_jsonl_survives_any_last_line(tmp_path, rest):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + rest)
    run_files.Jsonl(file, start_step=5).close()
    assert file.read_text() == '{"step": 1}\n'
    assert (tmp_path / "metrics.jsonl.damaged").exists() == bool(rest.strip())


def test_damaged_lines_are_set_aside_and_named_and_good_ones_stay(tmp_path):
    file, said = tmp_path / "metrics.jsonl", []
    bad = b'\xff\xfe\n{"step": "x"}\n' + b"[" * 100_000 + b"\n"
    file.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n{"step": 9}\n')
    run_files.Jsonl(file, 5, said.append).close()
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == bad
    assert len(said) == 1 and "3 damaged line(s): they are now in metrics.jsonl.damaged" in said[0]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_stands_in_the_place_of_the_metrics_is_set_aside(tmp_path, kind):
    file, elsewhere, said = tmp_path / "metrics.jsonl", tmp_path / "elsewhere", []
    elsewhere.write_text("mine")
    makes = {"folder": file.mkdir, "link": lambda: file.symlink_to(elsewhere)}
    makes.get(kind, lambda: os.mkfifo(file))()
    tracker = run_files.Jsonl(file, 0, said.append)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert len(file.read_text().splitlines()) == 1 and elsewhere.read_text() == "mine"
    assert "is not a file: it is now metrics.jsonl.damaged" in said[0] and len(said) == 1


def test_metrics_that_cannot_be_written_for_a_while_lose_no_line(tmp_path, monkeypatch):
    file, said = tmp_path / "metrics.jsonl", []
    tracker = run_files.Jsonl(file, 0, said.append)
    real, room = os.write, [10_000]

    def full(opened, text):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(opened, text[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    for step in range(1, 9):
        room[0] = {2: 5, 3: 0, 4: 0}.get(step, 10_000)  # a half line, then none
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [*range(1, 9)]
    assert ["cannot be written (No space" in line for line in said] == [True, False]


def test_metrics_go_on_where_the_workdir_was_removed(tmp_path):
    run, said = tmp_path / "run", []
    tracker, record = run_files.Jsonl(run / "m", 0, said.append), run_files.Record(run, said.append)
    record.write("config.json", {"seed": 1})
    tracker.log(1, {})
    shutil.rmtree(run)
    record.mend()
    tracker.log(2, {})
    tracker.close()
    assert (run / "m").read_text() == '{"step": 2}\n'
    assert json.loads((run / "config.json").read_text()) == {"seed": 1}
    assert len(said) == 2 and all("removed" in line for line in said)


def test_files_of_a_run_are_not_written_through_links(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.json").symlink_to(tmp_path / "mine")
    run_files.Record(tmp_path, print).write("config.json", {"seed": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "config.json").is_symlink()


def test_a_record_that_cannot_be_written_is_said_once_and_tried_again(tmp_path):
    said: list[str] = []
    record = run_files.Record(tmp_path, said.append)
    (tmp_path / "config.json").mkdir()
    record.write("config.json", {"seed": 1})
    record.mend()
    assert len(said) == 1 and "cannot be written (Is a directory)" in said[0]
    (tmp_path / "config.json").rmdir()
    record.mend()
    assert (tmp_path / "config.json").is_file()


class Moody:
    """A tracker that raises whatever it likes, or hangs."""

    def __init__(self):
        self.seen: list[int] = []

    def log(self, step, metrics):
        self.seen.append(step)
        if step == 2:
            raise SystemExit("no more")
        if step == 4:
            threading.Event().wait()

    def close(self):
        raise RuntimeError("closed badly")


def test_a_tracker_that_raises_or_hangs_costs_no_training(monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    said: list[str] = []
    for last, ending in ((3, "closed badly"), (4, "did not finish within")):
        moody = Moody()
        tracker = trackers.InThread("moody", moody, said.append)
        for step in range(1, last + 1):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
        assert moody.seen == [*range(1, last + 1)] and ending in said.pop()
        assert "moody failed (SystemExit: no more): training continues" in said.pop() and not said


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setitem(trackers.CLASSES, "wandb", broken)
    with pytest.raises(ValueError, match="wandb cannot be started: RuntimeError: No API key conf"):
        trackers.start(("wandb",), tmp_path, {}, 0)


def test_a_run_started_anew_leaves_no_line_of_the_lost_one(tmp_path):
    for _ in range(2):  # the first run ended before its first checkpoint
        tracker = run_files.Jsonl(tmp_path / "metrics.jsonl", start_step=0)
        tracker.log(0, {"eval/loss": 3.0})
        tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_tensorboard_writes_every_metric_and_the_config(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is optional")
    logs = trackers.start(("tensorboard",), tmp_path, {"seed": 7}, start_step=0)
    for step in (10, 20):
        for log in logs:
            log.log(step, {"loss": step / 10, "eval/held/loss": 0.5})
    for log in logs:
        log.close()
    events = read_events(tmp_path)
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    wanted = {(10, "loss"): 1.0, (20, "loss"): 2.0}
    wanted |= {(step, "eval/held/loss"): 0.5 for step in (10, 20)}
    assert scalars == wanted
    assert any(b'"seed": 7' in event.SerializeToString() for event in events)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_purges_what_a_lost_run_logged(tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is optional")
    trackers.TensorBoard(tmp_path, {}, start_step=20).close()
    kinds = [(event.step, event.session_log.status) for event in read_events(tmp_path)]
    assert (21, proto.SessionLog.START) in kinds  # TensorBoard hides events from step 21 before it


def read_events(workdir) -> list:
    """Read TensorBoard's records: length uint64, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_wandb_logs_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for start_step in (0, 10):
        tracker = trackers.Wandb(tmp_path, {"seed": 7}, start_step)
        tracker.log(start_step + 1, {"loss": 1.0})
        tracker.close()
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_an_unknown_tracker_is_named_at_the_start(make_config):
    with pytest.raises(
        ValueError, match=r"log.trackers: 'x' is not one of \['tensorboard', 'wandb'"
    ):
        validate(make_config(**{"log.trackers": ("x",)}), 8)
    assert trackers.CLASSES.keys() == settings.TRACKERS.keys()


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def sets(make_model, tmp_path):
    """A model folder, its mesh and two evaluation sets of very different size."""
    folder = make_model()
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    data = settings.Data(seq_len=64)
    examples, loaders = {}, {}
    for name, size, answer in (("large", 9, "yes, I think so"), ("small", 2, "no")):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": "q" * n, "response": answer[: 2 + n]} for n in range(1, size + 1)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = {name: settings.Source(str(file))}
        examples[name] = prepare(sources, folder, data, progress=False)
        options = dict(rows=4, micro_rows=4, mesh=mesh, shuffle=False, seed=0)
        loaders[name] = Loader(examples[name], data, None, **options)
    return folder, mesh, examples, loaders


def test_evaluation_weighs_every_token_of_every_example_once(sets):
    folder, mesh, examples, loaders = sets
    assert loaders["large"].num_rows % 4 and loaders["small"].num_rows < 4  # tails are not full

    raw = hf_folder.read_json(folder / "config.json")
    family = models.find(raw["model_type"])
    cfg = family.Config.from_hf(raw)
    model_def = ModelDef.of(family, cfg, dtype="float32")
    tensors = hf_reader.check(folder, model_def.specs, cfg.axis_sizes, cfg.tied)
    shardings = placement.shardings(model_def.specs, mesh)
    params = hf_reader.load(
        tensors, model_def.specs, cfg.axis_sizes, shardings, np.float32, progress=False
    )
    with jax.set_mesh(mesh):
        found = evaluate.evaluate(make_eval_step(model_def, mesh), params, loaders)

    # Directly: one example at a time, in float64 from the logits on.
    model = jax_sft.load(folder)
    totals = {}
    for name, of_set in examples.items():
        tokens = np.zeros((len(of_set), 64), np.int32)
        for row, example in zip(tokens, of_set, strict=True):
            row[: len(example)] = example.tokens
        logits = np.asarray(model.logits(tokens), np.float64)
        totals[name] = np.zeros(3)
        for row, example in zip(logits, of_set, strict=True):
            row = row[: len(example)] - row[: len(example)].max(-1, keepdims=True)
            at_target = row[np.arange(len(example)), example.targets]
            losses = np.log(np.exp(row).sum(-1)) - at_target
            correct = row.argmax(-1) == example.targets
            totals[name] += [(x * example.weights).sum() for x in (losses, correct, 1)]
    for prefix, total in [
        *((f"eval/{name}/", total) for name, total in totals.items()),
        ("eval/", totals["large"] + totals["small"]),
    ]:
        loss, correct, weight = total
        assert found[prefix + "loss"] == pytest.approx(loss / weight, rel=1e-5)
        assert found[prefix + "perplexity"] == pytest.approx(math.exp(loss / weight), rel=1e-4)
        assert found[prefix + "accuracy"] == pytest.approx(correct / weight, rel=1e-6)
    # Weighing sets or batches equally would give something else.
    means = [found["eval/large/loss"], found["eval/small/loss"]]
    assert abs(found["eval/loss"] - sum(means) / 2) > 1e-3 * abs(means[0] - means[1])
    assert evaluate.evaluate(None, params, {}) == {}


def test_a_perplexity_beyond_floats_stays_valid_json():
    def step(params, batch, before):
        return {"loss": 8000.0, "weight": 8.0, "correct": 2.0}

    loader = SimpleNamespace(batches=lambda start, stop: [None] * stop, steps_per_epoch=3)
    found = evaluate.evaluate(step, {}, {"a": loader})
    assert found["eval/a/perplexity"] == math.exp(700) and found["eval/a/loss"] == 1000
    assert found["eval/accuracy"] == 0.25


def test_a_batch_is_read_while_the_next_one_is_computed(monkeypatch):
    events = []

    def step(params, batch, before):
        events.append(f"start {batch} after {before['loss']:.0f}")
        return {"loss": float(batch), "weight": 1.0, "correct": 1.0}

    def device_get(sums):
        events.append(f"read {sums['loss']:.0f}")
        return sums

    monkeypatch.setattr(jax, "device_get", device_get)
    loader = SimpleNamespace(batches=lambda start, stop: [1, 2, 3], steps_per_epoch=3)
    assert evaluate.evaluate(step, {}, {"a": loader})["eval/a/loss"] == 2
    assert events == [
        *("start 1 after 0", "read 0", "start 2 after 1", "read 1"),
        *("start 3 after 2", "read 2", "read 3"),
    ]


def test_an_evaluation_waits_for_the_batch_before(sets):
    folder, mesh, _, loaders = sets
    model = jax_sft.load(folder, mesh)
    with jax.set_mesh(mesh):
        batch = next(iter(loaders["small"].batches(0, 1)))
        step = make_eval_step(model.model_def, mesh)
        text = step.lower(model.params, batch, no_sums()).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r" = f32\[\] parameter\(", entry)) == len(no_sums())


@pytest.fixture
def encoded(tmp_path):
    tiny.write_tokenizer(tmp_path)
    tokenizer = encoding.load_tokenizer(tmp_path)
    messages = [
        *({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nyes"}),
        *({"role": "user", "content": "So?"}, {"role": "assistant", "content": "no"}),
    ]
    items = [formats.Conversation(part, None) for part in (messages, messages[:2])]
    results = encoding.Encoder(tokenizer, encoding.Options()).encode(items)
    examples = Examples.in_memory({"all": [one for found in results for one in found]})
    return tokenizer, examples[0], examples[1]


def test_the_first_turn_is_the_prompt_at_inference_and_its_answer(encoded):
    tokenizer, *examples = encoded
    for example in examples:
        prompt, answer = evaluate.first_turn(example)
        assert tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(answer) == "\nyes<|im_end|>"


def answer_with(tokenizer, examples, given, stop_ids):
    """What `evaluate.answers` makes of given answers: (metrics, calls of greedy, lines)."""
    calls, lines = [], []

    def greedy(prompts, max_new_tokens, stop_ids):
        calls.append((max_new_tokens, stop_ids))
        return [tokenizer.encode(text, add_special_tokens=False) for text in given[: len(prompts)]]

    model = SimpleNamespace(greedy=greedy)
    found = evaluate.answers(model, tokenizer, {"held": examples}, 9, stop_ids, lines.append)
    return found, calls, lines


def test_exact_match_is_the_share_of_answers_equal_to_the_last_character(encoded):
    tokenizer, *examples = encoded
    stops = [tokenizer.eos_token_id]
    found, calls, lines = answer_with(tokenizer, examples, ["\nyes", "\nye "], stops)
    assert found == {"eval/held/exact_match": 0.5}
    assert calls == [(5, stops)]  # newline, y, e, s and the end of turn
    assert len(lines) == 2 and "'\\nye '" in lines[1]


def test_an_answer_behind_which_the_export_would_not_stop_is_no_match(encoded):
    tokenizer, *examples = encoded
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    on = ["\nyes<|im_end|>\n"] * 2
    found, calls, lines = answer_with(tokenizer, examples, on, [other])
    assert found == {"eval/held/exact_match": 0.0}
    assert calls == [(6, [other])] and all("does not stop" in line for line in lines)
    # The same text, and the bound is reached without a stop.
    found, *_ = answer_with(tokenizer, examples, ["\nyes", "\nyes?"], [other, 258])
    assert found == {"eval/held/exact_match": 0.5}
