"""Run TRL's SFTTrainer on packed rows, with the options that TRL recommends.

The rows are those of all subjects, in the format of TRL's own packing (input_ids, labels,
seq_lengths), so that losses can be compared step by step. `how` reports how many rows TRL's own
packing ("bfd") makes of the same examples. TRL's collator, loss, optimizer and loop are unchanged.
"""

import functools

import datasets
import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]

from scripts.peers import contract, torch_model


def main() -> None:
    spec = contract.read()
    datasets.disable_progress_bars()
    rows = [
        {name: array[row] for name, array in batch.items()}
        for batch in spec.batches()
        for row in range(len(batch["tokens"]))
    ]
    model = torch_model.load(spec)
    clock = contract.Clock(spec)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(spec, len(rows)),
        train_dataset=datasets.Dataset.from_list([to_trl(row) for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(spec.model),
        callbacks=[Timer(clock, model.device)],
    )
    trainer.train()
    peak = torch_model.peak_bytes(model.device)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = contract.mean_loss(spec, functools.partial(torch_model.nll, model, spec))
    how = (
        f"SFTTrainer, packed, {trainer.args.optim.value}, {torch_model.describe(model)}; examples "
        f"{'isolated' if isolates(model) else 'NOT ISOLATED'}; its own packing makes "
        f"{own_rows(spec)} rows of the {len(rows)} given"
    )
    del trainer, model
    fresh = torch_model.load(spec)
    before = contract.mean_loss(spec, functools.partial(torch_model.nll, fresh, spec))
    tokens, trained = contract.counts(spec)
    contract.report(
        how=how,
        packages=["trl", "torch", "transformers"],
        step_s=clock.timed,
        losses=losses,
        tokens=tokens,
        trained=trained,
        first_step_s=clock.first_step_s,
        peak_bytes=peak,
        held_out_before=before,
        held_out_after=after,
    )


class Timer(transformers.TrainerCallback):
    """Record when steps end."""

    def __init__(self, clock: contract.Clock, device: torch.device):
        self._clock, self._device = clock, device

    def on_step_end(self, args, state, control, **_):
        torch_model.wait(self._device)
        self._clock.step()


def arguments(spec: contract.Spec, num_rows: int) -> "trl.SFTConfig":
    """Return the options: packing as documented, arithmetic as in all other subjects."""
    numbers = spec.optimizer
    return trl.SFTConfig(
        output_dir=spec.workdir,
        packing=True,
        max_length=spec.seq_len,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows come packed
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=num_rows // spec.steps,
        max_steps=spec.steps,
        learning_rate=numbers["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=numbers["b1"],
        adam_beta2=numbers["b2"],
        adam_epsilon=numbers["eps"],
        weight_decay=numbers["weight_decay"],
        max_grad_norm=numbers["clip_norm"],
        bf16=spec.dtype == "bfloat16",
        use_cpu=spec.device == "cpu",
        # TRL recomputes every layer by default to save memory, which a CPU does not need.
        gradient_checkpointing=spec.device == "gpu",
        logging_steps=1,  # the loss of each step
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def to_trl(row) -> dict[str, list[int]]:
    """Return a packed row in the format of TRL's `pack_dataset`."""
    parts = list(contract.segments(row))
    return {
        "input_ids": [token for ids, _ in parts for token in ids],
        "labels": [label for _, labels in parts for label in labels],
        "seq_lengths": [len(ids) for ids, _ in parts],
    }


def own_rows(spec: contract.Spec) -> int:
    """Return the number of rows that TRL's own packing makes of the same examples."""
    ids = [ids for ids, _ in contract.read_examples(spec.examples)]
    return len(trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), spec.seq_len))


def isolates(model: transformers.PreTrainedModel) -> bool:
    """Return whether an example's hidden states are independent of earlier ones in its row."""
    ids = torch.arange(40, device=model.device)[None] % 7
    positions = torch.cat([torch.arange(20), torch.arange(20)]).to(model.device)[None]
    other = torch.cat([ids[:, :20] + 1, ids[:, 20:]], dim=1)
    with torch.no_grad():
        first, second = (
            model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state
            for tokens in (ids, other)
        )
    return bool(torch.allclose(first[:, 20:], second[:, 20:], atol=1e-5, rtol=1e-4))


if __name__ == "__main__":
    main()
