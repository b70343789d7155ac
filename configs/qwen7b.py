"""Full fine-tuning of Qwen2.5-7B-Instruct on one node of 8 GPUs with 80 GB or more.

python -m jax_sft.train --config=configs/qwen7b.py --config.data.train.main.path=my.jsonl

Per GPU: 11.4 GB of float32 weights and moments (7.6B x 12 bytes / 8), 3.8 GB of gradients, and the
activations of one row of 4096 tokens, recomputed in the backward pass (remat = "full").
The data file has the fields prompt and response, or messages; see jax_sft/config.py.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "Qwen/Qwen2.5-7B-Instruct"
    cfg.data.train.main = config.source("data/train.jsonl")
    cfg.data.seq_len = 4096
    cfg.batch.rows = 64
    cfg.batch.micro_rows = 8
    cfg.train.epochs = 2.0
    cfg.optimizer.learning_rate = 1e-5
    cfg.mesh.fsdp = 8
    return cfg
