"""Check the files of a run's checkpoints or of an export, and name what is wrong.

    python -m jax_sft.verify --checkpoint=RUN [--step=N] [--full]
    python -m jax_sft.verify --export=DIR

Of checkpoints it compares all sizes, and the sha256 of files below 1 MiB, with the manifests that
the run wrote. With --full the sha256 of every file, and then the checksum of every array, read in
blocks. Of what `export` and `convert` wrote, or of a run with an export, it compares every file
with the SHA256SUMS that was written last (`sha256sum -c` does so too, but names no foreign files).

Changes nothing. Exit code 0: all good; 1: something is damaged, each file is named; 64: there is
nothing to check.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

from tqdm import tqdm

from jax_sft import export_check
from jax_sft.checkpoint import model_files, orbax_io, to_hf
from jax_sft.files import paths, step_folders, sums
from jax_sft.runtime import exit_codes


def problems_of(folder: Path, step: int, full: bool) -> tuple[list[str], list[str], str]:
    """Return (problems, warnings, what it holds) of a step."""
    bar = f"step {step}, files" if full else ""
    found = step_folders.check(folder, step, hashes=full, progress=bar)
    if found.manifest is None:
        return [*found.problems], [*found.warnings], ""
    size = sum(num_bytes for num_bytes, _ in found.manifest.files.values())
    arrays = found.manifest.arrays
    holds = f"{len(found.manifest.files)} files, {len(arrays)} arrays, {size / 1e9:.3f} GB"
    problems = [*found.problems]
    # Files that are known to be damaged are not given to Orbax.
    if full and not problems:
        for name, stored in tqdm(arrays.items(), f"step {step}, arrays", unit="array", delay=1):
            problem = orbax_io.problem(folder / str(step), name, stored)
            problems += [problem] if problem else []
    return problems, [*found.warnings], holds


def verify(folder: Path, step: int | None, full: bool) -> int:
    """Print a table of steps; return the exit code."""
    present = step_folders.present(folder)[::-1]
    if not present or (step is not None and step not in present):
        wanted = "steps" if step is None else f"step {step}"
        print(f"error: {folder} has no {wanted}; it has {present}", file=sys.stderr)
        return exit_codes.USER_ERROR
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
        if step_folders.is_leftover(name) or step_folders.CORRUPT in name:
            print(f"{name:>14}  never loaded")
    print(f"{bad} damaged; {time.monotonic() - began:.1f} s")
    return 1 if bad else 0


def verify_export(folder: Path) -> int:
    """Compare an export, or that of a run, with its SHA256SUMS; return the exit code."""
    in_run = folder / to_hf.OF_RUN
    is_run = not (folder / sums.NAME).exists() and (in_run / sums.NAME).exists()
    return export_check.check_files(in_run if is_run else folder)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="a run, its checkpoint folder or a step")
    what.add_argument("--export", help="a folder that was exported or converted, or its run")
    parser.add_argument("--step", type=int, default=None, help="which step [all]")
    parser.add_argument("--full", action="store_true", help="read all files and all arrays")
    options = parser.parse_args()
    if options.export and (options.full or options.step is not None):
        parser.error("--step and --full belong to --checkpoint; of an export all files are read")
    # An export that cannot be read is the user's to mend; of a run `lifecycle` decides.
    expected = (ValueError, OSError) if options.export else ValueError
    try:
        if options.export:
            return verify_export(paths.local(options.export, "--export"))
        folder = paths.local(options.checkpoint, "--checkpoint")
        return verify(*step_folders.locate(folder, options.step), options.full)
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR


if __name__ == "__main__":
    lifecycle.run(main)
