"""LoRA on Qwen2.5-7B-Instruct, on one GPU.

python -m jax_sft.train --config=configs/lora7b.py --config.data.train.main.path=my.jsonl

The predicted peak on an H200 is 17.5 GiB, or 8.6 GiB with --config.lora.quantize=nf4. To predict
it for another GPU:

python -m jax_sft.plan --config=configs/lora7b.py --target=h200 --gpus-per-host=1

The export in the run's folder loads with peft.PeftModel.from_pretrained.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "Qwen/Qwen2.5-7B-Instruct"
    cfg.data.train.main = config.source("data/train.jsonl")
    cfg.data.seq_len = 4096
    cfg.batch.rows = 8
    cfg.batch.micro_rows = 1
    cfg.train.epochs = 2.0
    cfg.train.export = True
    cfg.lora.rank = 16
    cfg.lora.alpha = 32.0
    cfg.optimizer.learning_rate = 1e-4
    return cfg
