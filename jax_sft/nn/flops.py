"""Count the FLOPs that a model needs in a training step, by part, from its parameter specs.

Called by `metrics` for the MFU of a run and by `planning.step_cost` for the MFU of a plan.
"""

from collections.abc import Collection, Iterable, Mapping

from jax_sft.weights.param_spec import ParamSpec


def model_flops(
    specs: Iterable[ParamSpec],
    axis_sizes: Mapping[str, int],
    tied: bool,
    tokens: float,
    pairs: float,
    trained_tokens: float,
    frozen: Collection[str] = (),
    forward_only: bool = False,
) -> dict[str, float]:
    """Return the FLOPs that the model needs by part: once forward and twice that backward.

    Counts matrix products only, without the embedding lookup and without recomputation. Of the
    experts, only those that a token is sent to count. Attention counts the visible query-key pairs
    (causal, within segments), not the padded square. Sliding windows are ignored, so the result is
    too high when segments are longer than the window. Frozen matrices need no gradient of their
    own, so their backward pass counts once.

    Args:
        tokens: tokens that are not padding.
        pairs: visible query-key pairs.
        trained_tokens: tokens with a loss; the head multiplies only these.
        frozen: paths of the frozen weights.
    """
    parts = {"embedding": 0.0, "attention_projections": 0.0}
    flops_per_pair = (1 if forward_only else 3) * 4 * axis_sizes["heads"] * axis_sizes["head_dim"]
    parts["attention_scores"] = flops_per_pair * axis_sizes["layers"] * pairs
    for spec in specs:
        if spec.is_matrix and (part := _part(spec, tied)) != "embedding":
            applied = trained_tokens if part == "head" else tokens
            products = 1 if forward_only else 2 if spec.path in frozen else 3
            flops = 2 * products * spec.active_size(dict(axis_sizes)) * applied
            parts[part] = parts.get(part, 0.0) + flops
    return parts


def _part(spec: ParamSpec, tied: bool) -> str:
    names = spec.path.split(".")
    if names[0] == "embed":
        return "head" if tied else "embedding"
    if names[0] == "head":
        return "head"
    if "attn" in names:
        return "attention_projections"
    return "mlp" if "mlp" in names else "other"
