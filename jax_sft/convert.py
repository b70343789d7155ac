"""Write a Hugging Face model folder as a checkpoint of its parameters.

    python -m jax_sft.convert --model=FOLDER_OR_HUB_ID --out=DIR [--dry-run]

Training starts from the checkpoint with --config.model.path=DIR. Each process then reads only its
own shards, which saves time on clusters that start often. Weights keep their dtype unless --dtype
is given. `python -m jax_sft.export --checkpoint=DIR` makes a model folder of the checkpoint again.
No GPU is used, and less than 4 GiB of memory for a model of any size.
"""

import argparse
import os
import sys

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

from absl import logging

from jax_sft.checkpoint import from_hf, orbax_io
from jax_sft.runtime import exit_codes
from jax_sft.weights import hf_reader


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model folder, or a hub id: downloaded")
    parser.add_argument("--revision", default="", help="commit or tag of a hub id [main]")
    parser.add_argument("--out", default="", help="the folder to write: new, or empty")
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", *hf_reader.NAMES],
        help="dtype of all arrays [that of the tensors]",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be written; reads only headers"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an older conversion in --out"
    )
    options = parser.parse_args()
    if not options.out and not options.dry_run:
        parser.error("--out is needed without --dry-run")
    logging.set_verbosity(logging.ERROR)  # Orbax warns about intended settings
    try:
        if options.dry_run:
            planned = from_hf.plan(options.model, revision=options.revision, dtype=options.dtype)
            print("\n".join(planned.lines()))
            return 0
        out = from_hf.convert(
            options.model,
            options.out,
            revision=options.revision,
            dtype=options.dtype,
            overwrite=options.overwrite,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except (OSError, orbax_io.Failed) as error:
        print(f"error: {options.out} could not be written: {error}", file=sys.stderr)
        return exit_codes.NOT_SAVED
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    lifecycle.run(main)
