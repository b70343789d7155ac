"""Steps that are not finite change nothing, are counted and shown; too many stop the run."""

import functools
import json
import math

import numpy as np
import pytest

import jax_sft
from jax_sft.data.batches.loader import Loader
from jax_sft.training.step_guard import Health
from tests import sharing

GOOD = {"loss": 60.0, "weight": 60.0, "grad_norm": 1.0, "skipped": 0.0}
BAD = GOOD | {"loss": math.nan, "skipped": 1.0}


def make_health(**changes):
    said, dumped = [], []
    options = {"on_nonfinite": "skip", "most": 2, "say": said.append, **changes}
    return (
        Health(dump=lambda found: dumped.append(sorted(found)) or "HERE", **options),
        said,
        dumped,
    )


def test_isolated_bad_steps_are_counted_and_do_not_stop():
    health, said, dumped = make_health(skipped=5)
    for step in range(1, 40):
        health.note(step, BAD if step % 3 else GOOD)
    assert health.skipped == 5 + 26 and dumped == []
    assert said[0].startswith("WARNING step 1: loss nan") and "6 in all" in said[0]


def test_one_more_than_allowed_in_a_row_stops_with_their_batches():
    health, _, dumped = make_health()
    health.note(1, BAD)
    health.note(2, GOOD)
    health.note(3, BAD)
    health.note(4, BAD)
    with pytest.raises(FloatingPointError, match="step 5.*3 such step.* in a row, 4 in all.*HERE"):
        health.note(5, BAD)
    assert dumped == [[3, 4, 5]]


def test_raise_stops_at_the_first():
    health, _, dumped = make_health(on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        health.note(1, BAD)
    assert dumped == [[1]]


def test_a_spike_is_flagged_and_usual_noise_is_not():
    health, said, _ = make_health()
    noise = np.random.default_rng(0).uniform(0.5, 1.5, 1000)
    for step, loss in enumerate(noise, start=1):
        health.note(step, GOOD | {"loss": 60 * loss})
    assert said == [] and health.spikes == 0
    health.note(1001, GOOD | {"loss": 60 * 6.0})
    assert health.spikes == 1 and said[0].startswith("WARNING step 1001: loss 6.0000")


def test_a_loss_far_above_guessing_is_named_at_once_and_once(tmp_path):
    health, said, _ = make_health(vocab=50_000)
    for step, loss in enumerate((10.9, 7_880_974.0, 9e6, 3.0, 22.0), start=1):
        health.note(step, GOOD | {"loss": 60 * loss})
    assert [line.partition(" is above 21.6")[0] for line in said] == [
        *("WARNING step 2: loss 7880974.0000", "WARNING step 5: loss 22.0000")
    ]


def test_a_run_of_which_no_step_was_applied_is_an_error():
    health, _, dumped = make_health(skipped=1, most=9)
    health.require_applied(0)
    health.note(2, BAD)
    with pytest.raises(FloatingPointError, match=r"none of the 2 step\(s\) was applied.*HERE"):
        health.require_applied(2)
    assert dumped == [[2]]
    health.note(3, GOOD)
    health.require_applied(3)


@pytest.fixture
def bad_steps(monkeypatch):
    """Make the batches of these steps, from 1, give an infinite loss."""
    steps: set[int] = set()
    build = Loader.build

    def broken(loader, step, rows):
        built = build(loader, step, rows)
        if step + 1 in steps:
            built["weights"][built["weights"] > 0] = np.inf
        return built

    monkeypatch.setattr(Loader, "build", broken)
    return steps


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """All runs of this file train with the same program."""
    with sharing.one_program():
        yield


@pytest.fixture
def make_config(make_config):
    return functools.partial(
        make_config, **{"optimizer.schedule": "constant", "optimizer.warmup": 0.0}
    )


def losses(run) -> dict[int, float | None]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_bad_batch_is_skipped_on_the_devices_and_the_run_goes_on(
    make_config, tmp_path, bad_steps, capsys
):
    cfg = make_config(**{"train.steps": 8})
    jax_sft.train(cfg, tmp_path / "good")
    bad_steps |= {4, 6, 7}
    jax_sft.train(cfg, tmp_path / "bad")
    good, bad = losses(tmp_path / "good"), losses(tmp_path / "bad")
    assert [step for step, loss in bad.items() if loss is None] == [4, 6, 7]
    assert [bad[step] for step in (1, 2, 3)] == [good[step] for step in (1, 2, 3)]
    assert bad[5] != good[5] and math.isfinite(bad[5]) and math.isfinite(bad[8])
    said = capsys.readouterr().out
    assert "step 7: loss nan" in said or "step 7: loss inf" in said
    assert "(2 in a row, 3 in all)" in said
    last = json.loads((tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] == 3


def test_a_run_that_applied_nothing_is_neither_saved_nor_exported(make_config, tmp_path, bad_steps):
    cfg = make_config(**{"train.steps": 2, "train.export": True})
    bad_steps |= {1, 2}
    with pytest.raises(FloatingPointError, match="none of the 2"):
        jax_sft.train(cfg, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"model_files"} and not (tmp_path / "run" / "export").exists()


def test_three_bad_steps_in_a_row_stop_and_leave_their_batches(make_config, tmp_path, bad_steps):
    cfg = make_config(**{"train.steps": 8, "checkpoint.every_steps": 3})
    bad_steps |= {4, 5, 6}
    with pytest.raises(FloatingPointError, match="step 6: .*nonfinite"):
        jax_sft.train(cfg, tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run" / "nonfinite").iterdir())
    assert left == [f"step_{n}.{kind}" for n in (4, 5, 6) for kind in ("json", "npz")]
    told = json.loads((tmp_path / "run" / "nonfinite" / "step_5.json").read_text())
    assert len(told["rows"]) == 8 and told["rows"][0][0]["source"] == "main"
    assert 0 <= told["rows"][0][0]["row"] < 60
    arrays = np.load(tmp_path / "run" / "nonfinite" / "step_5.npz")
    assert arrays["tokens"].shape == (8, 128) and np.isinf(arrays["weights"]).any()
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
