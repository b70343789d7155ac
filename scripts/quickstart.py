"""Prove that jax_sft trains: a tiny random model learns to spell unseen words backwards.

Called by quickstart.sh. Trains a Hugging Face folder on a mesh of 8 simulated devices and exports
it. Answers held-out questions greedily before and after. Exits with 1 unless exact match rises from
under 5% to over 90%.
"""

import json
import time
from pathlib import Path

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin(requeues=True)

import transformers

import jax_sft
from configs import tiny
from jax_sft.sharding.mesh import make_mesh, simulate_cpu_devices

WORKDIR = Path("runs/quickstart")


def answer(folder: str | Path, mesh, questions: list[str]) -> list[str]:
    """Answer each question greedily with the model in a Hugging Face folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    model = jax_sft.load(folder, mesh)
    answers = model.greedy(prompts, max_new_tokens=8, stop_ids=[tokenizer.eos_token_id])
    return [tokenizer.decode(ids) for ids in answers]


def keep_earlier(workdir: Path) -> None:
    """Rename the workdir of an earlier quickstart, as someone may have continued training in it."""
    if not workdir.exists():
        return
    number = 1
    while (earlier := workdir.with_name(f"{workdir.name}.{number}")).exists():
        number += 1
    workdir.rename(earlier)
    print(f"{workdir} of an earlier quickstart is {earlier} now", flush=True)


def main() -> int:
    began = time.perf_counter()
    cfg = tiny.get_config()
    keep_earlier(WORKDIR)
    simulate_cpu_devices(cfg.mesh.cpu_devices)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    heldout = Path(cfg.data.eval.heldout.path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in heldout]
    questions, references = [r["prompt"] for r in rows], [r["response"] for r in rows]

    before = answer(cfg.model.path, mesh, questions)
    print(
        "\n$ python -m jax_sft.train --config=configs/tiny.py --workdir=runs/quickstart", flush=True
    )
    jax_sft.train(cfg, WORKDIR)
    print(
        "\n$ python scripts/export_hf.py --checkpoint=runs/quickstart/checkpoints "
        "--out=runs/quickstart/hf",
        flush=True,
    )
    exported = jax_sft.export(WORKDIR / "checkpoints", WORKDIR / "hf")
    after = answer(exported, mesh, questions)

    print(f"\n{'held-out question':25s} {'before':>20s} {'after':>8s} {'right answer':>13s}")
    for row in list(zip(questions, before, after, references, strict=True))[:10]:
        question, first, last, reference = (text.replace("\ufffd", "?") for text in row)
        print(f"{question:25s} {ascii(first[:8]):>20s} {ascii(last):>8s} {reference!r:>13s}")
    scores = [
        sum(map(str.__eq__, answers, references)) / len(references) for answers in (before, after)
    ]
    print(
        f"\nexact match on {len(references)} held-out questions: {scores[0]:.0%} before, "
        f"{scores[1]:.0%} after, in {time.perf_counter() - began:.0f} s; model in {exported}"
    )
    return 0 if scores[0] < 0.05 and scores[1] > 0.9 else 1


if __name__ == "__main__":
    lifecycle.run(main)
