"""Write a checkpoint of a run as a Hugging Face folder.

    python scripts/export_hf.py --checkpoint=RUN/checkpoints --out=DIR [--step=N]

The folder holds safetensors, config.json, generation config, tokenizer and chat template, and
loads with transformers.AutoModelForCausalLM.from_pretrained. Of a run with adapters it holds these,
for peft.PeftModel.from_pretrained, or with --merge the whole model. No GPU is used.
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# JAX reads its platform, and Python finds the package, by the two lines above: hence E402.
from jax_sft import hf  # noqa: E402
from jax_sft.hf_export import export  # noqa: E402


def parse_bytes(text: str) -> int:
    """Read a size such as 5GB, 500MB or 1000000 (decimal units, as Hugging Face has them)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="the checkpoints folder of a run")
    parser.add_argument("--out", required=True, help="the folder to write; must be empty or new")
    parser.add_argument("--step", type=int, default=None, help="which step [the newest]")
    parser.add_argument(
        "--shard-size", type=parse_bytes, default="5GB", help="largest file [%(default)s]"
    )
    parser.add_argument(
        "--dtype", default="", choices=["", *hf.NAMES], help="of all tensors [as in the original]"
    )
    parser.add_argument(
        "--merge", action="store_true", help="add adapters to their model's weights, write those"
    )
    parser.add_argument(
        "--base",
        default="",
        help="folder of the weights that did not train [model.path of the run]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options = parser.parse_args()
    try:
        out = export(
            options.checkpoint,
            options.out,
            step=options.step,
            shard_bytes=options.shard_size,
            dtype=options.dtype,
            merge=options.merge,
            base=options.base,
            overwrite=options.overwrite,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
