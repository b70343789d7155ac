"""Read config.json of a Hugging Face model, and check its fields and their ranges.

A family's `Config.from_hf` asks for the fields that it implements; `Fields.done` refuses every
other one whose value could change what transformers computes.
"""

import reprlib
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")  # of config.json
MAX_PARAMETERS = 2**50  # keeps the bytes of a model and its moments far below 2**63

# Lowest and highest value of each size. The limits are far above every existing model, and low
# enough that lists of layers and shapes stay small until they are checked against the headers.
SIZES: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "moe_intermediate_size": (1, 2**22),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (1, 2**14),
    "num_experts": (1, 2**12),
    "num_local_experts": (1, 2**12),
    "num_experts_per_tok": (1, 2**12),
    "max_position_embeddings": (1, 2**31 - 1),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "sliding_window": (1, 2**31 - 1),
    "sliding_window_pattern": (1, 2**12),
}
# Lowest and highest value of each number. Outside of these, float32 overflows or the input is lost.
NUMBERS: dict[str, tuple[float, float]] = {
    "rms_norm_eps": (1e-20, 1.0),
    "initializer_range": (0.0, 1.0),
    "query_pre_attn_scalar": (1e-6, 1e9),
    "attn_logit_softcapping": (1e-3, 1e9),
    "final_logit_softcapping": (1e-3, 1e9),
    "router_aux_loss_coef": (0.0, 1e6),
    "partial_rotary_factor": (1e-6, 1.0),
    "rope_theta": (1.001, 1e15),
    "rope_local_base_freq": (1.001, 1e15),
    "factor": (1.0, 1e6),
    "attention_factor": (1e-3, 1e3),
    "attn_factor": (1e-3, 1e3),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "short_factor": (1e-6, 1e6),
    "long_factor": (1e-6, 1e6),
}

# Fields that describe files, tokens, training, generation or implementation details. No value of
# them changes the logits.
_IGNORED = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "is_llama_config"),
    *("unsloth_version", "unsloth_fixed", "auto_map", "task_specific_params", "id2label"),
    *("label2id", "num_labels", "problem_type", "output_attentions", "output_hidden_states"),
    *("return_dict", "tokenizer_class", "decoder_start_token_id", "sep_token_id"),
    *("name_or_path", "is_decoder", "finetuning_task", "prefix", "torchscript", "tf_legacy_loss"),
    *("use_bfloat16", "classifier_dropout", "tie_last_hidden_states", "gradient_checkpointing"),
    *("attn_implementation", "experts_implementation", "use_flash_attn", "max_sequence_length"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan"),
    *("use_flash_attention", "use_flash_attention_2", "model_max_length", "seq_length"),
    *("cache_implementation", "max_seq_len", "max_seq_length", "initializer_std", "torch_compile"),
    *("unk_token_id", "mask_token_id", "padding_idx", "padding_side", "add_bos_token", "bos_token"),
    *("eos_token", "license", "language", "revision", "trust_remote_code", "custom_pipelines"),
    "dual_chunk_attention_config",  # Qwen2.5-1M: an option of vLLM that transformers does not have
    # Generation parameters, which transformers removes from config.json.
    *("max_new_tokens", "renormalize_logits", "num_logits_to_keep"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty", "num_beam_groups"),
    *("diversity_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
}
_OFF = (False, None)
_NO_DROPOUT = (0.0, None)
# Fields that change the computation unless they have one of these values. A field in neither table
# may be null or empty, but not false: nobody knows whether false is neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),  # transformers from 5.2: anything else is bidirectional attention
    "activation": ("swiglu", "silu", None),  # Falcon3 has it in addition to hidden_act
    **dict.fromkeys(("no_bias", "causal", "use_rope", "use_rotary", "use_rms_norm"), (True, None)),
    **dict.fromkeys(
        (
            *("use_bidirectional_attention", "bidirectional", "is_encoder_decoder"),
            *("add_cross_attention", "tie_encoder_decoder", "use_sliding_window", "use_mrope"),
            *("rope_interleaved", "attention_bias", "mlp_bias", "qkv_bias", "bias", "use_bias"),
            *("lm_head_bias", "attn_bias", "qk_layernorm", "qk_norm", "use_qk_norm"),
            *("use_parallel_residual", "scale_embedding", "attn_output_gate", "norm_head"),
            *("use_logn_attn", "logn_attn", "use_moe", "moe"),
            *("mtp_hidden_states_first", "alibi", "use_alibi", "is_quantized"),
        ),
        _OFF,
    ),
    **dict.fromkeys(
        (
            *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
            *("residual_dropout", "resid_dropout", "embd_dropout", "embedding_dropout"),
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout"),
            *("dropout", "dropout_rate", "layerdrop", "ffn_dropout", "mlp_dropout"),
            *("router_jitter_noise", "chunk_size_feed_forward", "num_nextn_predict_layers"),
            "shared_expert_intermediate_size",
        ),
        _NO_DROPOUT,
    ),
    **dict.fromkeys(
        (
            *("pretraining_tp", "partial_rotary_factor", "decoder_sparse_step", "rotary_pct"),
            *("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"),
        ),
        (1, None),
    ),
}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal. 0 equals 0.0, but not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def shown(value: Any) -> str:
    """Return a value for a message, abbreviated if it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    short.maxdict = short.maxlist = 6
    return short.repr(value)


def size(name: str, value: Any) -> int:
    """Return the value of a field that must be an integer within SIZES.

    Raises:
        ValueError: the value is not.
    """
    low, high = SIZES[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"config.json: {name} = {shown(value)} must be a positive integer")
    if value > high:
        raise ValueError(f"config.json: {name} = {shown(value)} is over {high:,}")
    return value


def number(name: str, value: Any) -> float:
    """Return the value of a field that must be a number within NUMBERS.

    Raises:
        ValueError: the value is not, or is not finite.
    """
    low, high = NUMBERS[name]
    if not is_number(value) or not low <= value <= high:
        raise ValueError(
            f"config.json: {name} = {shown(value)} must be a number from {low:g} to {high:g}"
        )
    return float(value)


class Fields:
    """Reader of config.json that overlooks no field: `done` refuses fields that were not read."""

    def __init__(self, config: dict[str, Any]):
        self._config = config
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` if it is absent or null."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def known(self, *names: str) -> None:
        """Mark fields as read that are read elsewhere or change nothing in this family."""
        self._read.update(names)

    def unused(self, *names: str) -> None:
        """Mark fields as read that change nothing here, but must be integers for transformers."""
        for name in names:
            value = self.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"config.json: {name} = {shown(value)} must be an integer")

    def only(self, name: str, value: Any) -> None:
        """Refuse a field with any other value than `value`, which is the default."""
        if not same(given := self.get(name, value), value):
            raise ValueError(f"config.json: {name} = {shown(given)} is not supported: use {value}")

    def size(self, name: str, default: int | None = None) -> int:
        """Return an integer within SIZES; without a default, the field is required."""
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"config.json has no {name!r}, which {self.model_type} needs")
        return size(name, value)

    def number(self, name: str, default: float) -> float:
        """Return a number within NUMBERS."""
        return number(name, self.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} = {shown(value)} must be true or false")
        return value

    def soft_cap(self, name: str, default: float = 0.0) -> float:
        """Return the bound of a soft cap; 0 = none, which config.json writes as null."""
        self.known(name)
        if self._config.get(name, default or None) is None:
            return 0.0
        return self.number(name, default)

    def windows(self, layer_types: list[str], window: int) -> tuple[tuple[bool, ...], int | None]:
        """Return (whether each layer uses the sliding window, its size or None if no layer does).

        Args:
            layer_types, window: defaults of layer_types and sliding_window.
        """
        types, num_layers = self.get("layer_types", layer_types), self.size("num_hidden_layers")
        if not isinstance(types, list) or any(kind not in LAYER_TYPES for kind in types):
            raise ValueError(
                f"config.json: layer_types = {shown(types)} must be a list of {LAYER_TYPES}"
            )
        if len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries for num_hidden_layers = "
                f"{num_layers}"
            )
        windowed = tuple(kind == "sliding_attention" for kind in types)
        if any(windowed) and self._config.get("sliding_window", window) is None:
            raise ValueError("config.json: sliding_window is null, yet some layer_types have one")
        size = self.size("sliding_window", window)
        return windowed, size if any(windowed) else None

    def heads(self, head_dim: int | None = None) -> tuple[int, int, int]:
        """Return (heads, kv heads, head dim), checked against each other.

        Args:
            head_dim: default of head_dim; None = hidden_size / num_attention_heads.
        """
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        head_dim = self.size("head_dim", head_dim or max(self.size("hidden_size") // heads, 1))
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads = {heads} is not divisible by "
                f"num_key_value_heads = {kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(
                f"config.json: head_dim = {head_dim} must be even for rotary embedding"
            )
        return heads, kv_heads, head_dim

    @property
    def model_type(self) -> str:
        return shown(self._config.get("model_type")).strip("'")

    def done(self) -> None:
        """Check the fields that were not read.

        Raises:
            ValueError: a field that this family does not implement has a value that could change
                the computation. Neutral values and private names (leading underscore) pass.
        """
        self.number("initializer_range", 0.02)  # unused, but transformers refuses invalid values
        unknown = [
            f"{shown(name).strip(chr(39))} = {shown(value)}"
            for name, value in self._config.items()
            if name not in self._read and not _changes_nothing(name, value)
        ]
        if unknown:
            more = f"; and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            raise ValueError(
                f"config.json has fields that {self.model_type} here does not implement: "
                + "; ".join(unknown[:20])
                + f"{more}. Remove those that change nothing in the computation, or use another "
                "model"
            )


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether a field that the family does not read leaves the computation unchanged."""
    if name in _IGNORED or name.startswith("_") or name == "transformers.js_config":
        return True
    if name in _NEUTRAL:
        return any(same(value, neutral) for neutral in _NEUTRAL[name])
    if name == "layer_types" and isinstance(value, list) and value:
        return all(kind == "full_attention" for kind in value)
    return value is None or value in ([], {}, "")
