"""Check the files of a run's checkpoints or of an export, and name the damaged ones.

    python -m jax_sft.verify --checkpoint=RUN [--step=N] [--full]
    python -m jax_sft.verify --export=DIR

--checkpoint compares the sizes of all files, and the sha256 of files below 1 MiB, with the
manifests that the run wrote. With --full it compares the sha256 of every file and then the checksum
of every array, read in blocks. --export compares every file with SHA256SUMS, which `export` and
`convert` write last. DIR may also be a run with an export. (`sha256sum -c` compares too, but does
not name foreign files.)

Changes nothing. Exit code 0: all files are good; 1: files are damaged, and each is named; 64: there
is nothing to check.
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
    """Return (problems, warnings, summary of the contents) of a step."""
    bar = f"step {step}, files" if full else ""
    checked = step_folders.check(folder, step, hashes=full, progress=bar)
    if checked.manifest is None:
        return [*checked.problems], [*checked.warnings], ""
    size = sum(num_bytes for num_bytes, _ in checked.manifest.files.values())
    arrays = checked.manifest.arrays
    holds = f"{len(checked.manifest.files)} files, {len(arrays)} arrays, {size / 1e9:.3f} GB"
    problems = [*checked.problems]
    # Never let Orbax read files that are known to be damaged.
    if full and not problems:
        for name, stored in tqdm(arrays.items(), f"step {step}, arrays", unit="array", delay=1):
            problem = orbax_io.problem(folder / str(step), name, stored)
            problems += [problem] if problem else []
    return problems, [*checked.warnings], holds


def verify(folder: Path, step: int | None, full: bool) -> int:
    """Print a table of steps and return the exit code."""
    present = step_folders.present(folder)[::-1]
    if not present or (step is not None and step not in present):
        missing = "steps" if step is None else f"step {step}"
        print(f"error: {folder} has no {missing}; it has {present}", file=sys.stderr)
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
    """Compare an export, or the export of a run, with SHA256SUMS and return the exit code."""
    in_run = folder / to_hf.RUN_EXPORT
    is_run = not (folder / sums.NAME).exists() and (in_run / sums.NAME).exists()
    return export_check.check_files(in_run if is_run else folder)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="a run, its checkpoint folder or a step")
    what.add_argument("--export", help="a folder that was exported or converted, or its run")
    parser.add_argument("--step", type=int, default=None, help="step to check [all]")
    parser.add_argument("--full", action="store_true", help="read all files and all arrays")
    options = parser.parse_args()
    if options.export and (options.full or options.step is not None):
        parser.error("--step and --full belong to --checkpoint; --export always reads all files")
    # The user can repair an export that cannot be read. For a run, `lifecycle` handles OSError.
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
