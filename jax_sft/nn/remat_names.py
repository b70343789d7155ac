"""Names of the values of a layer that model.remat and model.offload may keep, without JAX.

`compute` makes policies of them; `planning` counts what is computed again.
"""

# Values of a layer that can be named in model.remat and model.offload, [rows, tokens, ...]:
NAMES = {
    "residual": "the layer's input, features wide",
    "qkv": "rotated queries and keys, and values",
    "attention": "what attention returns, before its output projection",
    "attention_lse": "log-sum-exp of the attention scores: with `attention`, its forward is kept",
    "mlp": "gate and up of the MLP, by far the largest",
    "dots": "what every matrix product with a weight returns",
}
# What the policies keep that are made of NAMES.
KEPT = {"full": (), "attn": ("attention", "attention_lse"), "dots": ("dots",)}
