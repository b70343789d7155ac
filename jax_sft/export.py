"""Write a checkpoint of a run as a Hugging Face folder.

    python -m jax_sft.export --checkpoint=RUN --out=DIR [--step=N]
        [--dry-run] [--verify] [--push-to-hub=NAMESPACE/NAME]

--out must be new or empty; with --overwrite it may also be an older export that nobody changed.

The folder holds safetensors, config.json, generation config, tokenizer and chat template, and
loads with transformers.AutoModelForCausalLM.from_pretrained. For a run with adapters it holds the
adapters, which load with peft.PeftModel.from_pretrained, or with --merge the whole model. No GPU is
used. Only a few blocks of a tensor are in memory at a time, under 4 GiB for a model of 7B
parameters.

With --verify, transformers loads the result, its logits are compared with those of jax_sft, and one
answer is generated. This needs PyTorch and 4 bytes of memory per parameter. Exit code 65: the
logits differ, or generation does not stop at the token that ends the trained turns; nothing is
uploaded then.

Generation with the export stops at the model's own stop tokens and at the tokens that end the
trained turns. eos_token_id in generation_config.json and config.json lists them. --tokenizer-eos
also makes the token that ends most trained turns the tokenizer's eos_token.
"""

import argparse
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

from jax_sft import export_check
from jax_sft.checkpoint import to_hf
from jax_sft.files import paths, step_folders
from jax_sft.runtime import exit_codes
from jax_sft.weights import hf_reader, hub


def parse_bytes(text: str) -> int:
    """Parse a size such as 5GB, 500MB or 1000000, with decimal units as in Hugging Face."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()])


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run, one of its steps, or a folder written by `convert`",
    )
    parser.add_argument("--out", default="", help="the folder to write: new, or empty")
    parser.add_argument("--step", type=int, default=None, help="step to export [the newest]")
    parser.add_argument(
        "--shard-size", type=parse_bytes, default="5GB", help="largest file [%(default)s]"
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", *hf_reader.NAMES],
        help="dtype of all tensors [as in the original]",
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge adapters into the model's weights"
    )
    parser.add_argument(
        "--base",
        default="",
        help="folder of the frozen weights [model.path of the run]",
    )
    parser.add_argument(
        "--tokenizer-eos",
        action="store_true",
        help="make the token that ends trained turns the tokenizer's eos_token",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in --out")
    parser.add_argument("--dry-run", action="store_true", help="list what would be written")
    parser.add_argument("--verify", action="store_true", help="compare with transformers")
    parser.add_argument(
        "--push-to-hub", default="", metavar="NAMESPACE/NAME", help="upload the export there"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    options = parser.parse_args()
    if not options.out and not options.dry_run:
        parser.error("--out is needed without --dry-run")
    return options


def run(options: argparse.Namespace) -> int:
    """Run the export with these options and return the exit code.

    Raises:
        ValueError: the options or the checkpoint do not allow the export.
        hub.Failed: the upload failed.
    """
    chosen: dict[str, Any] = dict(
        step=options.step,
        shard_bytes=options.shard_size,
        dtype=options.dtype,
        merge=options.merge,
        base=options.base,
    )
    folder, step = step_folders.locate(
        paths.local(options.checkpoint, "--checkpoint"), options.step
    )

    def write(step: int | None) -> tuple[to_hf.Plan, Path | None]:
        chosen["step"] = step
        planned = to_hf.plan(folder, **chosen)
        chosen["step"] = planned.step  # fixed, in case a newer step appears meanwhile
        if options.dry_run:
            return planned, None
        if options.verify and (problem := export_check.missing(planned)):
            raise ValueError(problem)
        if options.push_to_hub:
            hub.check(options.push_to_hub)
        return planned, to_hf.export(
            *(folder, options.out),
            **chosen,
            overwrite=options.overwrite,
            tokenizer_eos=options.tokenizer_eos,
        )

    planned, out = step_folders.newest_again(folder, step, write)
    if out is None:
        print("\n".join(planned.lines()))
        return exit_codes.DONE
    print(f"wrote {out}")
    if options.verify and export_check.check_files(out):
        return exit_codes.BAD_DATA
    if options.verify:
        difference, most, answer = export_check.compare(planned, out)
        same = difference <= most  # false for NaN
        print(answer.line)
        print(
            f"logits of transformers and jax_sft differ by at most {difference:.2g}, "
            f"{most:.2g} is allowed: {'the same' if same else 'NOT THE SAME'}"
        )
        if not same or answer.runs_on:
            return exit_codes.BAD_DATA
    if options.push_to_hub:
        print(f"uploaded {hub.push(out, options.push_to_hub, private=not options.public)}")
    return exit_codes.DONE


class _CallableModule(types.ModuleType):
    """Makes `jax_sft.export` both this module and the function, in any order of access."""

    def __call__(self, *args: Any, **options: Any) -> Path:
        return to_hf.export(*args, **options)


sys.modules[__name__].__class__ = _CallableModule


def main() -> int:
    """Run the command line."""
    options = parse()
    try:
        return run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except (OSError, hub.Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.NOT_SAVED


if __name__ == "__main__":
    lifecycle.run(main)
