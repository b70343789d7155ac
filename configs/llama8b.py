"""Full fine-tuning of Llama-3.1-8B-Instruct on one node of 8 GPUs with 80 GB or more.

python -m jax_sft.train --config=configs/llama8b.py --config.data.train.main.path=my.jsonl

Per GPU: 12.0 GB of float32 weights and moments (8.0B x 12 bytes / 8), 4.0 GB of gradients, and the
activations of one row of 4096 tokens. The model is gated: log in with `hf auth login`, or set
--config.model.path to a local folder.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    cfg.data.train.main = config.source("data/train.jsonl")
    cfg.data.seq_len = 4096
    cfg.batch.rows = 64
    cfg.batch.micro_rows = 8
    cfg.train.epochs = 2.0
    cfg.optimizer.learning_rate = 1e-5
    cfg.mesh.fsdp = 8
    return cfg
