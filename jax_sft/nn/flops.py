"""FLOPs that a model needs in a training step, by part, from its weight rows.

Called by `metrics` for the MFU of a run and by `planning.step_cost` for that of a plan.
"""

from collections.abc import Collection, Iterable, Mapping

from jax_sft.weights.param_spec import Weight


def model_flops(
    rows: Iterable[Weight],
    dims: Mapping[str, int],
    tied: bool,
    tokens: float,
    pairs: float,
    trained_tokens: float,
    frozen: Collection[str] = (),
    forward_only: bool = False,
) -> dict[str, float]:
    """Return the FLOPs that the model needs, by part: forward and twice that backward.

    Matrix products only, without the lookup in the embedding table and without recomputation; of
    experts those that a token takes. Attention counts the query-key pairs that are visible (causal,
    within segments), not the padded square. A sliding window is not counted: where segments are
    longer, this is too much. Matrices that are frozen need no gradient of their own: forward and
    once that backward.

    Args:
        tokens: tokens that are not padding.
        pairs: visible query-key pairs.
        trained_tokens: those that the head multiplies; nothing else needs the others' logits.
        frozen: paths of what does not train.
    """
    parts = {"embedding": 0.0, "attention_projections": 0.0}
    of_scores = (1 if forward_only else 3) * 4 * dims["heads"] * dims["head_dim"]
    parts["attention_scores"] = of_scores * dims["layers"] * pairs
    for row in rows:
        if row.is_matrix and (part := _part(row, tied)) != "embedding":
            applied = trained_tokens if part == "head" else tokens
            products = 1 if forward_only else 2 if row.path in frozen else 3
            flops = 2 * products * row.active_size(dict(dims)) * applied
            parts[part] = parts.get(part, 0.0) + flops
    return parts


def _part(row: Weight, tied: bool) -> str:
    names = row.path.split(".")
    if names[0] == "embed":
        return "head" if tied else "embedding"
    if names[0] == "head":
        return "head"
    if "attn" in names:
        return "attention_projections"
    return "mlp" if "mlp" in names else "other"
