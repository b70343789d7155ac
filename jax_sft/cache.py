"""List or clear the caches: tokenized sources and compiled programs.

    python -m jax_sft.cache [--dir=FOLDER]
    python -m jax_sft.cache --clear [--older-than=DAYS]

A source that a running process uses is not removed. Removed entries are made again when needed.
"""

import argparse
import time
from pathlib import Path

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()

from jax_sft.data.tokens import cache_room
from jax_sft.files import cache_folder, paths

DAY_S = 24 * 3600


def main() -> int:
    """List or clear the caches and return the exit code."""
    parser = argparse.ArgumentParser(
        prog=lifecycle.program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", default="", help="data.cache_dir of the config, if set")
    parser.add_argument("--clear", action="store_true", help="remove the listed entries")
    parser.add_argument(
        "--older-than",
        type=float,
        default=0,
        metavar="DAYS",
        help="only entries that were not used for DAYS",
    )
    options = parser.parse_args()
    if not 0 <= options.older_than < float("inf"):
        parser.error(f"--older-than={options.older_than}: use a number of days from 0 up")
    folder = paths.local(options.dir, "--dir") if options.dir else cache_folder.default()
    before = time.time() - options.older_than * DAY_S
    for entry in cache_room.entries(folder):
        if options.older_than and entry.used > before:
            continue
        state = ""
        if options.clear:
            state = "removed  " if cache_room.remove(entry) else "in use   "
        names = ", ".join(entry.names[:3]) + (", ..." if len(entry.names) > 3 else "")
        print(
            f"{state}{entry.num_tokens:>15,} tokens {entry.num_bytes / 1e6:>9,.1f} MB, used "
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.used))}: {names or '?'}\n"
            f"    {entry.folder}"
        )
    compiled(folder / "compiled", before if options.older_than else None, options.clear)
    return 0


def compiled(folder: Path, before: float | None, clear: bool) -> None:
    """List or remove JAX's compiled programs."""
    programs = [
        file for file in folder.rglob("*-cache") if file.is_file() and not file.is_symlink()
    ]
    chosen = [
        file
        for file in programs
        if before is None or max(file.stat().st_atime, file.stat().st_mtime) <= before
    ]
    size = sum(file.stat().st_size for file in chosen)
    if clear:
        for file in chosen:
            file.unlink(missing_ok=True)
    state = "removed  " if clear else ""
    print(f"{state}{len(chosen)} compiled programs, {size / 1e6:,.1f} MB: {folder}")


if __name__ == "__main__":
    lifecycle.run(main)
