"""scripts/peers/jax_plain.py, the plain JAX step that ours is compared with, is right itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from scripts.peers import jax_plain

REPO = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
OPTIMIZER = dict(learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
SEGMENTS = (9, 14, 6)  # of a row of 32 tokens: 3 of padding


def packed(num_rows: int, vocab: int) -> dict[str, np.ndarray]:
    """Packed rows of random tokens, arrays [rows, 32]."""
    rng = np.random.default_rng(0)
    total = sum(SEGMENTS)
    shape = (num_rows, 32)
    names = ("tokens", "targets", "segment_ids", "positions")
    found: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
    found["weights"] = np.zeros(shape, np.float32)
    tokens = rng.integers(1, vocab, (num_rows, total + 1))
    found["tokens"][:, :total], found["targets"][:, :total] = tokens[:, :-1], tokens[:, 1:]
    found["weights"][:, :total] = rng.random((num_rows, total)) < 0.6
    found["segment_ids"][:, :total] = np.repeat([1, 2, 3], SEGMENTS)
    found["positions"][:, :total] = np.concatenate([np.arange(n) for n in SEGMENTS])
    return found


def torch_loss(model, batch) -> torch.Tensor:
    """The mean loss of the trained tokens, one segment after the other."""
    losses = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            ids, targets, weights = (
                torch.tensor(batch[name][row][here]) for name in ("tokens", "targets", "weights")
            )
            logits = model(ids[None].long()).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
            losses.append((loss * weights).sum())
    return torch.stack(losses).sum() / float(batch["weights"].sum())


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["qwen2", "llama"])
def test_losses_and_steps_are_those_of_torch(make_strong_model, changes):
    folder = make_strong_model(**changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    raw = json.loads((folder / "config.json").read_text())
    cfg = jax_plain.Config.of(raw, "float32")
    batch = packed(2, cfg.vocab)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    params, tx = jax_plain.load(folder, cfg), jax_plain.make_optimizer(OPTIMIZER)
    state, step = tx.init(params), jax_plain.make_step(cfg, tx)
    for _ in range(3):
        params, state, loss = step(params, state, batch)
        adamw.zero_grad()
        wanted = torch_loss(model, batch)
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        assert abs(float(loss) - wanted.item()) < 1e-4
    norm = model.get_parameter("model.norm.weight").detach().numpy()
    np.testing.assert_allclose(params["norm"], norm, atol=1e-4)


def test_a_field_that_is_not_implemented_is_refused_by_name(make_model):
    raw = json.loads((make_model() / "config.json").read_text())
    for name, value in (
        ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "llama3"}),
        ("use_sliding_window", True),
        ("model_type", "gemma2"),
    ):
        with pytest.raises(ValueError, match=name):
            jax_plain.Config.of(raw | {name: value}, "float32")


def test_random_weights_have_the_shapes_of_loaded_ones(make_model):
    folder = make_model()
    cfg = jax_plain.Config.of(json.loads((folder / "config.json").read_text()), "float32")
    made, loaded = jax_plain.random(cfg), jax_plain.load(folder, cfg)

    assert {k: v.shape for k, v in made["layers"].items()} == {
        k: v.shape for k, v in loaded["layers"].items()
    }


def test_the_subject_prints_its_result(tmp_path, make_model):
    folder = make_model()
    rows = packed(3, 272)
    arrays: Any = {name: array[:, None] for name, array in rows.items()}
    np.savez(tmp_path / "rows.npz", **arrays)
    examples = [{"ids": [5, 6, 7, 8], "mask": [0, 0, 1, 1]}, {"ids": [9, 3, 4], "mask": [0, 1, 1]}]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(one) + "\n" for one in examples))
    spec = dict(
        model=str(folder),
        rows=str(tmp_path / "rows.npz"),
        examples="",
        held_out=str(held_out),
        seq_len=32,
        steps=3,
        warmup=1,
        dtype="float32",
        device="cpu",
        optimizer=OPTIMIZER,
        variant="",
        started=time.time(),
        workdir=str(tmp_path),
        ours={},
    )
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    script = REPO / "scripts" / "peers" / "jax_plain.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "spec.json")],
        env=os.environ | {"PYTHONPATH": str(REPO)},  # as scripts/bench.py sets it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 3 and len(found["step_s"]) == 2
    assert found["tokens"] == [29, 29] and found["held_out_before"] != found["held_out_after"]
    assert found["versions"]["optax"] and 0 < found["first_step_s"] < 120
