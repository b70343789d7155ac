"""Damage the files of a checkpoint in every way, and count the damages that are detected.

    python -m scripts.faults.damage [--flips=100]

Makes a checkpoint of two steps, then flips one bit at a time in each kind of file of the newer
step. After each flip a run is resumed with the default settings, which has to resume from the older
step. The step is also checked like `python -m jax_sft.verify --full` does, which has to call it
damaged. The column "unhashed" resumes without hashing files: it counts what Orbax and the checksums
of arrays detect. The other flips changed nothing that is loaded, unless "wrong" counts them. WAYS
cuts, empties, removes, fills and adds files; the tests apply it.
"""

import argparse
import contextlib
import os
import pickle
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from jax_sft import config, settings, tiny, verify
from jax_sft.checkpoint import model_files, resume, saving
from jax_sft.files import manifest, step_folders
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training.state import TrainState

OLD, NEW = 1, 2
# Data files have random names. Their kind also says whether they are hashed by default.
_NAMES = (
    (r"/d/[0-9a-f]{32}$", "/d/*"),
    (r"process_\d+", "process_N"),
    (r"\.\d+\.json$", ".N.json"),
)


def make_state(step: int, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """Return a state with a sharded 4 MiB kernel and two moments, so that data files are large."""
    mesh = mesh or make_mesh({"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1})
    rng = np.random.default_rng(step)

    def array(shape, dtype, *axes):
        value = rng.standard_normal(shape).astype(dtype)
        return jax.device_put(value, rules.sharding(mesh, *axes))

    kernel = ((1024, 1024), np.float32, "embed", "features")
    return TrainState(
        step=jax.device_put(np.int32(step), rules.sharding(mesh)),
        params={"a.kernel": array(*kernel), "b.scale": array((24,), np.float32, "norm")},
        opt_state={
            "count": jax.device_put(np.int32(step), rules.sharding(mesh)),
            "mu": array(kernel[0], jax.numpy.bfloat16, *kernel[2:]),
            "nu": array(*kernel),
        },
    )


def make(folder: Path) -> TrainState:
    """Save two steps and the model files to a folder; return the newer state."""
    model = folder.parent / "model"
    model.mkdir()
    tiny.write_tokenizer(model)
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    checkpoints = open_folder(folder, model)
    as_dict = config.to_dict(config.default())
    checkpoints.start(as_dict)
    for step in (OLD, NEW):
        save(checkpoints, make_state(step), as_dict, wait=True)
    assert checkpoints.saved_step == NEW and checkpoints.failures == 0
    return make_state(NEW)


def open_folder(folder: Path, model: Path | None = None, say=lambda _: None, **options):
    """Return the Checkpoints of a folder."""
    keep = settings.Checkpoint(**options)
    files = model_files.Model(model, {"w": "F32"}) if model else None
    return saving.Checkpoints(folder, keep, model=files, say=say)


def save(checkpoints: saving.Checkpoints, state: TrainState, *args, **options) -> None:
    """Save a state."""
    checkpoints.save(int(state.step), state.named(), *args, **options)


def restore(
    checkpoints: saving.Checkpoints, stored_step: resume.StoredStep, abstract: TrainState
) -> tuple[TrainState, resume.StoredStep]:
    """Return the state of the step in `stored_step` or of an older one, and which step it is."""
    arrays, stored_step = checkpoints.restore(stored_step, abstract.named())
    return abstract.from_named(stored_step.step, arrays), stored_step


def resumed(folder: Path, abstract: TrainState, **options) -> tuple[int, TrainState | None]:
    """Return (step, state) from which a run resumes; (-1, None) if it refuses to start."""
    checkpoints = open_folder(folder, **options)
    try:
        stored = checkpoints.start(config.to_dict(config.default()))
        assert stored
        state, stored = restore(checkpoints, stored, abstract)
    except ValueError:
        return -1, None
    return stored.step, state


def abstract_of(state: TrainState) -> TrainState:
    """Return the shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def kinds(folder: Path) -> dict[str, list[Path]]:
    """Return {kind: files} of the nonempty files of the newer step and of the model."""
    kind_files: dict[str, list[Path]] = {}
    for file in sorted([*(folder / str(NEW)).rglob("*"), *(folder / model_files.NAME).iterdir()]):
        if file.is_file() and file.stat().st_size:
            kind = file.relative_to(folder).as_posix()
            for pattern, name in _NAMES:
                kind = re.sub(pattern, name, kind)
            hashed = "" if file.stat().st_size < manifest.SMALL else " (over 1 MiB)"
            kind_files.setdefault(kind + hashed, []).append(file)
    return kind_files


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """Flip one bit of a file; restore it, and a quarantined step folder, at the end."""
    flip(file, bit)
    try:
        yield
    finally:
        for aside in file_folder(file).glob(f"{NEW}{step_folders.CORRUPT}*"):
            os.rename(aside, aside.parent / str(NEW))
        flip(file, bit)


def file_folder(file: Path) -> Path:
    """Return the checkpoint folder that contains a file."""
    return next(p.parent for p in file.parents if p.name in (str(NEW), model_files.NAME))


def flip(file: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


def is_refused(folder: Path, file: Path) -> bool:
    """Whether `verify --full` calls the damaged part damaged."""
    if file.parent.name == model_files.NAME:
        try:
            model_files.verify(folder)
        except ValueError:
            return True
        return False
    return bool(verify.problems_of(folder, NEW, full=True)[0])


def same(a: TrainState, b: TrainState | None) -> bool:
    """Whether two states are bitwise equal."""
    return b is not None and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def flip_all(folder: Path, state: TrainState, flips: int, seed: int = 0) -> dict[str, list[int]]:
    """Return {kind: numbers of [flips, detected by resume, by --full, unhashed, wrong arrays]}."""
    rng, table, abstract = random.Random(seed), {}, abstract_of(state)
    small = manifest.SMALL
    for kind, files in kinds(folder).items():
        row = table[kind] = [0] * 5
        for _ in range(flips):
            file = rng.choice(files)
            with flipped(file, rng.randrange(8 * file.stat().st_size)):
                full = is_refused(folder, file)
                step, _ = resumed(folder, abstract)
            with flipped(file, rng.randrange(8 * file.stat().st_size)):
                manifest.SMALL = 0
                unhashed, loaded = resumed(folder, abstract)
                manifest.SMALL = small
            wrong = unhashed == NEW and not same(state, loaded)
            for column, value in enumerate((1, step != NEW, full, unhashed != NEW, wrong)):
                row[column] += value
    return table


def truncate(file: Path) -> None:
    """Cut off the last byte."""
    os.truncate(file, file.stat().st_size - 1)


def zero(file: Path) -> None:
    """Replace the content with zeros of the same length."""
    file.write_bytes(bytes(file.stat().st_size))


def add_text(file: Path) -> None:
    """Put a harmless foreign file next to a file."""
    (file.parent / "notes.txt").write_text("hello")


def add_pickle(file: Path) -> None:
    """Put a pickle with a harmless name next to a file."""
    (file.parent / "notes.txt").write_bytes(pickle.dumps({"a": 1}))


def add_named_pickle(file: Path) -> None:
    """Put a file with the name of a torch checkpoint next to a file."""
    (file.parent / "model.pt").write_bytes(b"")


def add_link(file: Path) -> None:
    """Put a symbolic link that points out of the folder next to a file."""
    (file.parent / "link").symlink_to("/etc/hostname")


def replace_by_link(file: Path) -> None:
    """Replace a file with a link to a copy outside the folder."""
    outside = file_folder(file).parent / "outside"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)


def add_fifo(file: Path) -> None:
    """Put a named pipe, which blocks anyone who opens it, next to a file."""
    os.mkfifo(file.parent / "pipe")


WAYS: dict[str, Callable[[Path], Any]] = {
    "last byte cut off": truncate,
    "zeroed": zero,
    "emptied": lambda file: file.write_bytes(b""),
    "removed": Path.unlink,
    "foreign text": add_text,
    "foreign pickle": add_pickle,
    "foreign model.pt": add_named_pickle,
    "foreign link": add_link,
    "made a link": replace_by_link,
    "foreign pipe": add_fifo,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=100, help="per kind of file")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoints"
        state = make(folder)
        table = flip_all(folder, state, options.flips)
    print(f"{'file':52} {'flips':>6} {'resume':>7} {'--full':>7} {'unhashed':>9} {'wrong':>6}")
    for kind, row in table.items():
        print(f"{kind:52} {row[0]:6} {row[1]:7} {row[2]:7} {row[3]:9} {row[4]:6}")
    total = [sum(column) for column in zip(*table.values(), strict=True)]
    print(f"{'all':52} {total[0]:6} {total[1]:7} {total[2]:7} {total[3]:9} {total[4]:6}")
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if total[0] == total[1] == total[2] and not total[4] else 1


if __name__ == "__main__":
    sys.exit(main())
