"""Check the files of a run's checkpoints, and name what is wrong.

    python scripts/verify_checkpoint.py --checkpoint=RUN [--step=N] [--full]

Compares all sizes, and the sha256 of files below 1 MiB, with the manifests that the run wrote. With
--full the sha256 of every file, and then the checksum of every array, read in blocks. Changes
nothing. Exit code 0: all good; 1: something is damaged; 64: there is nothing to check.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# JAX reads its platform, and Python finds the package, by the two lines above: hence E402.
from jax_sft import lifecycle  # noqa: E402

if __name__ == "__main__":
    lifecycle.begin()

from tqdm import tqdm  # noqa: E402

from jax_sft import model_files, paths, steps, storage  # noqa: E402


def problems_of(folder: Path, step: int, full: bool) -> tuple[list[str], list[str], str]:
    """Return (problems, warnings, what it holds) of a step."""
    bar = f"step {step}, files" if full else ""
    found = steps.check(folder, step, hashes=full, progress=bar)
    if found.manifest is None:
        return [*found.problems], [*found.warnings], ""
    size = sum(num_bytes for num_bytes, _ in found.manifest.files.values())
    arrays = found.manifest.arrays
    holds = f"{len(found.manifest.files)} files, {len(arrays)} arrays, {size / 1e9:.3f} GB"
    problems = [*found.problems]
    # Files that are known to be damaged are not given to Orbax.
    if full and not problems:
        for name, stored in tqdm(arrays.items(), f"step {step}, arrays", unit="array", delay=1):
            problem = storage.problem(folder / str(step), name, stored)
            problems += [problem] if problem else []
    return problems, [*found.warnings], holds


def verify(folder: Path, step: int | None, full: bool) -> int:
    """Print a table of steps; return the exit code."""
    present = steps.present(folder)[::-1]
    if not present or (step is not None and step not in present):
        wanted = "steps" if step is None else f"step {step}"
        print(f"error: {folder} has no {wanted}; it has {present}", file=sys.stderr)
        return 64
    bad = 0
    began = time.monotonic()
    for number in present if step is None else [step]:
        problems, warnings, holds = problems_of(folder, number, full)
        bad += bool(problems)
        print(f"step {number:>9}  {'DAMAGED' if problems else 'good':7}  {holds}", flush=True)
        for line in problems:
            print(f"    {line}")
        for line in warnings:
            print(f"    note: {line}")
    try:
        model_files.verify(folder)
        print(f"{model_files.NAME:>14}  good")
    except ValueError as error:
        bad += 1
        print(f"{model_files.NAME:>14}  DAMAGED\n    {error}")
    for name in sorted(path.name for path in folder.iterdir()):
        if steps.is_leftover(name) or steps.CORRUPT in name:
            print(f"{name:>14}  never loaded")
    print(f"{bad} damaged; {time.monotonic() - began:.1f} s")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a run, its checkpoint folder or a step"
    )
    parser.add_argument("--step", type=int, default=None, help="which step [all]")
    parser.add_argument("--full", action="store_true", help="read all files and all arrays")
    options = parser.parse_args()
    try:
        folder = paths.local(options.checkpoint, "--checkpoint")
        return verify(*steps.locate(folder, options.step), options.full)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64


if __name__ == "__main__":
    lifecycle.run(main)
