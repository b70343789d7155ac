"""Names of the layer values that model.remat and model.offload may keep, without JAX.

`compute` builds policies from them; `planning` counts the recomputation.
"""

# {name in model.remat and model.offload: description}; the values are [rows, tokens, ...].
NAMES = {
    "residual": "the layer's input, features wide",
    "qkv": "rotated queries and keys, and values",
    "attention": "what attention returns, before its output projection",
    "attention_lse": "log-sum-exp of the attention scores: with `attention`, its forward is kept",
    "mlp": "gate and up of the MLP, by far the largest",
    "dots": "what every matrix product with a weight returns",
}
# {policy: the NAMES that it keeps}.
KEPT = {"full": (), "attn": ("attention", "attention_lse"), "dots": ("dots",)}
