"""Train a tiny Qwen2 to spell backwards, on 8 simulated CPU devices.

python -m jax_sft.train --config=configs/tiny.py

Needs 2 CPU cores, 1 GB of memory and 2 minutes. Held-out exact match rises to 100%. The config
first makes the model, tokenizer and data in runs/tiny-parts.
"""

from jax_sft import config, tiny


def get_config():
    parts = tiny.build("runs/tiny-parts")
    cfg = config.default()
    cfg.model.path = str(parts / "model")
    cfg.model.dtype = "float32"
    cfg.model.remat = "none"
    cfg.data.train.words = config.source(str(parts / "train.jsonl"))
    cfg.data.eval.heldout = config.source(str(parts / "heldout.jsonl"))
    cfg.data.seq_len = 256
    cfg.batch.rows = 8
    cfg.train.epochs = 1.2
    cfg.optimizer.learning_rate = 1e-3
    cfg.optimizer.warmup = 0.05
    cfg.mesh.fsdp = 2
    cfg.mesh.tensor = 2
    cfg.mesh.sequence = 2
    cfg.mesh.cpu_devices = 8
    cfg.eval.samples = 4
    cfg.eval.every_steps = 150
    cfg.checkpoint.every_steps = 150
    cfg.log.every_steps = 20
    return cfg
