"""Full fine-tuning of Llama-3.1-8B-Instruct on 8 to 64 GPUs with 80 GB or more.

python -m jax_sft.train --config=configs/llama8b.py --config.data.train.main.path=my.jsonl

Parameters, gradients and moments take 15 GiB on each of 8 GPUs. For the total, or for other GPUs:

python -m jax_sft.plan --config=configs/llama8b.py --target=h100

The model is gated: log in with `hf auth login`, or set --config.model.path to a local folder.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    cfg.data.train.main = config.source("data/train.jsonl")
    cfg.data.seq_len = 4096
    cfg.batch.rows = 64
    cfg.train.epochs = 2.0
    cfg.optimizer.learning_rate = 1e-5
    return cfg
