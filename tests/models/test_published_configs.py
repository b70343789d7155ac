"""No model that is in use is stranded: config.json files as they were published, with the fields
that each version of transformers and others' tools have written, are read.

The table is from memory, shortened where lists are long; it stands for the kinds of fields.
"""

import copy
import json
from pathlib import Path

import pytest
import transformers

from jax_sft import models

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
# What transformers 4.3x to 4.5x and others add to a model that is saved again.
ADDED = {
    **{"_name_or_path": "a/b", "_attn_implementation_autoset": True, "torch_dtype": "float16"},
    **{"attention_dropout": 0.0, "use_cache": False, "pad_token_id": 0, "rope_scaling": None},
    **{"unsloth_version": "2025.1.1", "unsloth_fixed": True, "transformers.js_config": {"a": 1}},
    **{"auto_map": {"AutoConfig": "a.B"}, "pretraining_tp": 1, "quantization_config": None},
    **{"max_new_tokens": 2048, "padding_side": "right", "unk_token_id": 0, "max_seq_len": 4096},
    **{"use_logn_attn": False, "license": "mit", "initializer_std": 0.02, "mask_token_id": None},
    **{"tokenizer_class": None, "pruned_heads": {}, "id2label": {"0": "LABEL_0"}},
}


def test_all_families_have_a_published_model():
    assert {config["model_type"] for config in PUBLISHED.values()} == {*models.families()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(name):
    published = PUBLISHED[name]
    ours = models.read(published)[1]
    assert models.read(ADDED | published | {"dtype": "bfloat16"})[1] == ours
    theirs = transformers.CONFIG_MAPPING[published["model_type"]](**copy.deepcopy(published))
    for is_short in (True, False):
        saved = json.loads(theirs.to_json_string(use_diff=is_short))
        assert models.read(saved)[1] == ours
