"""Full fine-tuning of Qwen2.5-7B-Instruct on 8 to 64 GPUs with 80 GB or more.

python -m jax_sft.train --config=configs/qwen7b.py --config.data.train.main.path=my.jsonl

The prediction for 8 x H100 is a peak of 33 of 79 GiB and 3.1 s per step (48% MFU). To predict them
for other GPUs:

python -m jax_sft.plan --config=configs/qwen7b.py --target=h100

The data file has the fields prompt and response, or messages; see jax_sft/config.py.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "Qwen/Qwen2.5-7B-Instruct"
    cfg.data.train.main = config.source("data/train.jsonl")
    cfg.data.seq_len = 4096
    cfg.batch.rows = 64
    cfg.train.epochs = 2.0
    cfg.optimizer.learning_rate = 1e-5
    return cfg
