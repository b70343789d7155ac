"""Full fine-tuning of SmolLM2-135M-Instruct; runs on 2 CPU cores.

python -m jax_sft.train --config=configs/smollm2_135m.py --config.data.train.main.path=my.json

Trains 30 steps of 4 rows of 512 tokens in float32. The data file has the fields instruction, input
and response. Measured figures are in docs/proofs.md.
"""

from jax_sft import config


def get_config():
    cfg = config.default()
    cfg.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    cfg.model.dtype = "float32"
    cfg.model.remat = "dots,attention,attention_lse"
    cfg.data.train.main = config.source(
        "data/train.json", prompt_key="instruction", query_key="input"
    )
    cfg.data.seq_len = 512
    cfg.batch.rows = 4
    cfg.train.steps = 30
    cfg.optimizer.learning_rate = 5e-5
    cfg.log.every_steps = 1
    return cfg
