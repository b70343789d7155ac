"""Train a transformers model in a plain PyTorch loop, like the examples on the web.

It trains on our packed rows, one after the other. Position ids that restart at 0 tell transformers
which tokens may attend to each other. The loss is the model's own: the head multiplies every token.
"""

import functools

import torch

from scripts.peers import contract, torch_model


def main() -> None:
    spec = contract.read()
    model = torch_model.load(spec)
    device = model.device
    optimizer = make_optimizer(model, spec.optimizer)
    clock, losses = contract.Clock(spec), []
    for batch in spec.batches():
        optimizer.zero_grad()
        total = int((batch["weights"] > 0).sum())
        summed = 0.0
        for row in range(len(batch["tokens"])):
            inputs = to_inputs({name: array[row] for name, array in batch.items()}, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
                # The sum of the losses is divided by num_items_in_batch.
                loss = model(**inputs, num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            summed += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer["clip_norm"])
        optimizer.step()
        losses.append(float(summed))
        torch_model.wait(device)
        clock.step()
    peak = torch_model.peak_bytes(device)
    after = contract.mean_loss(spec, functools.partial(torch_model.nll, model, spec))
    how = f"plain loop, rows packed by jax_sft, fused AdamW, {torch_model.describe(model)}"
    del model, optimizer
    fresh = torch_model.load(spec)
    before = contract.mean_loss(spec, functools.partial(torch_model.nll, fresh, spec))
    tokens, trained = contract.counts(spec)
    contract.report(
        how=how,
        packages=["torch", "transformers"],
        step_s=clock.timed,
        losses=losses,
        tokens=tokens,
        trained=trained,
        first_step_s=clock.first_step_s,
        peak_bytes=peak,
        held_out_before=before,
        held_out_after=after,
    )


def make_optimizer(model: torch.nn.Module, numbers: dict[str, float]) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": numbers["weight_decay"],
        },
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = numbers["b1"], numbers["b2"]
    rate = numbers["learning_rate"]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=numbers["eps"], fused=True)


def to_inputs(row, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a packed row without padding as arguments of the model, each [1, tokens]."""
    ids, labels, positions = [], [], []
    for segment_tokens, segment_labels in contract.segments(row):
        ids += segment_tokens
        labels += segment_labels
        positions += range(len(segment_tokens))
    arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([array], device=device) for name, array in arrays.items()}


if __name__ == "__main__":
    main()
