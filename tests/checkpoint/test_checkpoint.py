"""Checkpoints: what is stored comes back bitwise or not at all, whatever happens to the files."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from jax_sft import config, settings, verify
from jax_sft.checkpoint import model_files, orbax_io, saving, to_hf
from jax_sft.files import plain_paths, step_folders
from jax_sft.runtime import exit_codes
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import optim, state
from jax_sft.weights import vocabulary
from jax_sft.weights.param_spec import ParamSpec
from scripts.faults import damage
from tests import tiers

# What Orbax leaves behind when files are damaged raises again as it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NEW, OLD = damage.NEW, damage.OLD
STATE = damage.make_state(NEW)
ABSTRACT = damage.abstract_of(STATE)
CONFIG = config.to_dict(config.default())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint folder with two steps, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    damage.make(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it."""
    yield Path(shutil.copytree(saved, tmp_path / "checkpoints", symlinks=True))
    gc.collect()  # here, not in another test


def opened(folder: Path, **options):
    """Return (Checkpoints, the lines that they say)."""
    said: list[str] = []
    return damage.open_folder(folder, say=said.append, **options), said


def resume(folder: Path, **options):
    """Return (step, state, lines said) of a resumed run."""
    checkpoints, said = opened(folder, **options)
    found = checkpoints.start(CONFIG)
    assert found
    state, found = damage.restore(checkpoints, found, ABSTRACT)
    return found.step, state, "\n".join(said)


def test_what_is_saved_comes_back_bitwise_with_all_that_was_stored_beside(tmp_path):
    checkpoints, said = opened(tmp_path)
    assert checkpoints.start(CONFIG) is None
    damage.save(checkpoints, STATE, CONFIG, {"eval/loss": 2.5}, {"skipped": 3}, wait=True)
    assert (checkpoints.saved_step, checkpoints.failures, said) == (NEW, 0, [])
    found = opened(tmp_path)[0].start(CONFIG)
    assert found and found.step == NEW and found.extra == {"skipped": 3}
    stored = found.metadata
    assert stored["config"] == CONFIG and stored["metrics"] == {"eval/loss": 2.5}
    assert stored["data_position"] == NEW and stored["seed"] == 0
    assert stored["format_version"] == 2 and stored["versions"]["jax"] == jax.__version__
    step, state, _ = resume(tmp_path)
    assert step == NEW and damage.same(STATE, state)
    for before, after in zip(jax.tree.leaves(STATE), jax.tree.leaves(state), strict=True):
        assert before.sharding == after.sharding


@pytest.mark.parametrize(
    ("before", "after"), tiers.fast([(1, 2), (4, 2)], [(1, 2), (2, 4), (4, 2), (4, 1)])
)
def test_a_vocabulary_is_padded_anew_for_each_mesh(tmp_path, before, after):
    rows = [
        ParamSpec("embed.table", "embed", "vocab embed -> vocab embed"),
        ParamSpec("head.table", "head", "vocab embed -> embed vocab"),
    ]
    tx, dims = optax.adam(1e-3), {"vocab": 269, "embed": 16}

    def abstract(shards: int, dims=dims) -> state.TrainState:
        mesh = make_mesh({"fsdp": 8 // shards, "tensor": shards})
        return state.abstract(tx, rows, vocabulary.padded(dims, shards), np.float32, mesh)

    def filled(like: jax.ShapeDtypeStruct) -> jax.Array:
        real = [min(size, 269) for size in like.shape]
        array = np.random.default_rng(sum(real)).standard_normal(real)
        wider = np.zeros(like.shape, like.dtype)
        wider[tuple(slice(0, n) for n in real)] = array
        return jax.device_put(wider, like.sharding)

    def checkpoints(vocab: int = 269) -> saving.Checkpoints:
        known = vocabulary.Vocabulary.of(rows, vocab)
        return saving.Checkpoints(tmp_path, config.default().checkpoint, vocabulary=known)

    current = jax.tree.map(filled, abstract(before))
    current = dataclasses.replace(current, step=jax.device_put(np.int32(3), current.step.sharding))
    writer = checkpoints()
    writer.start(CONFIG)
    damage.save(writer, current, CONFIG, wait=True)
    assert writer.saved_step == 3
    reader = checkpoints()
    found = reader.start(CONFIG)
    assert found
    wanted = jax.tree.map(filled, abstract(after))
    read, _ = damage.restore(reader, found, abstract(after))
    assert damage.same(dataclasses.replace(wanted, step=read.step), read)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(wanted), strict=True):
        assert ours.sharding == theirs.sharding
    # Of another model, tokens are not taken for padding.
    with pytest.raises(ValueError, match="of another model"):
        damage.restore(checkpoints(267), found, abstract(after, {"vocab": 267, "embed": 16}))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_step_reads_with_plain_orbax(saved):
    found = ocp.load_checkpointables(str(saved / str(NEW)))
    for name, array in STATE.params.items():
        np.testing.assert_array_equal(found["params"][name], array)
    assert set(found["optimizer"]) == {"count", "mu", "nu"}
    stored = ocp.checkpointables_metadata(str(saved / str(NEW))).custom_metadata
    assert stored == step_folders.metadata(saved / str(NEW))


# Glob patterns, what TensorStore changes or refuses in a path, and what looks like a home folder.
NAMES = ["a[1]", "a**b", "back\\slash", "~", "two\nlines", "not utf-8 \udcff", "x" * 250 + "[y]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_save_below_any_name_reads_back_and_moves(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    checkpoints, said = opened(folder)
    saving.check_folder(folder)
    checkpoints.start(CONFIG)
    damage.save(checkpoints, STATE, CONFIG, wait=True)
    assert (checkpoints.saved_step, said) == (NEW, [])
    step, state, _ = resume(folder)
    assert step == NEW and damage.same(STATE, state)
    (tmp_path / name).rename(tmp_path / "moved")  # nothing stored names the folder
    step, state, _ = resume(tmp_path / "moved" / "checkpoints")
    assert step == NEW and damage.same(STATE, state)
    assert verify.problems_of(tmp_path / "moved" / "checkpoints", NEW, True)[0] == []


def test_a_name_that_cannot_be_stored_under_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_paths, "_DESCRIPTORS", tmp_path / "no proc")
    saving.check_folder(tmp_path / "plain, with blanks")
    with pytest.raises(ValueError, match=r"has a name that Orbax cannot store under"):
        saving.check_folder(tmp_path / "a[1]")


def test_any_name_can_be_stored_under_where_few_files_may_be_open(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = tmp_path / "a[1]"
    folder.mkdir()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        assert plain_paths.plain(folder).samefile(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_save_that_could_not_be_read_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_paths, "is_plain", lambda _: True)
    checkpoints, said = opened(tmp_path / "a[1]")  # Orbax finds nothing to merge, and succeeds
    checkpoints.start(CONFIG)
    damage.save(checkpoints, STATE, CONFIG)
    checkpoints.close()
    assert (checkpoints.saved_step, checkpoints.failures) == (None, 1)
    assert "Orbax has not written optimizer/manifest.ocdbt" in "\n".join(said)
    assert step_folders.present(tmp_path / "a[1]") == []


def test_training_goes_on_beside_a_save_and_does_not_change_it(tmp_path):
    grow = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints, _ = opened(tmp_path, keep=5)
    checkpoints.start(CONFIG)
    current, expected = damage.make_state(0), {}
    for step in range(1, 5):
        current = grow(current)
        expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), current)
        damage.save(checkpoints, current, CONFIG)
        for _ in range(3):  # donated at once, and again
            current = grow(current)
        current = jax.device_put(expected[step], jax.tree.map(lambda x: x.sharding, current))
    checkpoints.close()
    assert checkpoints.saved_step == 4 and checkpoints.failures == 0
    for step in (4, 3, 2, 1):
        assert verify.problems_of(tmp_path, step, full=True)[:2] == ([], [])
        found, state, _ = resume(tmp_path)
        assert found == step and damage.same(expected[step], state)
        shutil.rmtree(tmp_path / str(step))


@pytest.mark.parametrize(
    ("keep", "keep_best", "kept"),
    [tiers.full(1, 0, {6}), tiers.full(2, 0, {5, 6}), (1, 2, {2, 4, 6})],
)
def test_the_newest_and_the_best_steps_stay(tmp_path, keep, keep_best, kept):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 3.0, 6: None}
    checkpoints, _ = opened(tmp_path, keep=keep, keep_best=keep_best)
    checkpoints.start(CONFIG)
    for step, loss in losses.items():
        if step == 4:  # a resumed run still knows what was good before
            checkpoints.close()
            checkpoints, _ = opened(tmp_path, keep=keep, keep_best=keep_best)
            checkpoints.start(CONFIG)
        damage.save(
            checkpoints,
            damage.make_state(step),
            CONFIG,
            {"eval/loss": loss} if loss is not None else None,
        )
    checkpoints.close()
    assert {*step_folders.present(tmp_path)} == kept
    assert {path.name for path in tmp_path.iterdir()} == {str(step) for step in kept}


def test_no_step_is_removed_before_the_next_is_complete(tmp_path, monkeypatch):
    checkpoints, _ = opened(tmp_path, keep=1)
    checkpoints.start(CONFIG)
    damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)
    seen = []
    real = step_folders.remove_all

    def spy(folder, unwanted):
        seen.append((step_folders.present(folder), damage.resumed(folder, ABSTRACT)[0]))
        real(folder, unwanted)

    monkeypatch.setattr(step_folders, "remove_all", spy)
    damage.save(checkpoints, damage.make_state(2), CONFIG, wait=True)
    assert seen == [([2, 1], 2)] and step_folders.present(tmp_path) == [2]


def test_leftovers_of_killed_saves_are_removed_and_never_loaded(folder):
    for name in (
        "3.incomplete",
        "3.incomplete.orbax-checkpoint-tmp",
        "4.incomplete-2",
        "1.deleted-ab",
    ):
        shutil.copytree(folder / str(NEW), folder / name)
    (folder / ".model_files-0123abcd").mkdir()
    (folder / ".ab.probe").write_text("")
    mine = {"notes", "1.deleted-by-me", "2.incomplete.bak", ".model_files.bak", ".mine.probe"}
    for name in mine:
        (folder / name).write_text("mine")
    kept = {"1", "2", "model_files", *mine}
    step, state, said = resume(folder)
    assert step == NEW and damage.same(STATE, state)
    assert {path.name for path in folder.iterdir()} == kept
    assert "3.incomplete: left by a run that was killed, removed" in said


@pytest.mark.parametrize("name", damage.WAYS)
@pytest.mark.parametrize("which", [tiers.full("params/_METADATA"), "over 1 MiB"])
def test_every_damage_is_named_and_the_older_step_is_used(folder, name, which, capsys):
    kinds = damage.kinds(folder)
    (file,) = next(files for kind, files in kinds.items() if which in kind)
    damage.WAYS[name](file)
    harmless = name == "foreign text"
    code = verify.verify(folder, None, full=True)
    printed = capsys.readouterr().out
    assert code == (0 if harmless else 1)
    named = "notes.txt" if harmless else ""
    named = named or {
        "foreign pickle": "notes.txt", "foreign model.pt": "model.pt", "foreign link": "link",
        "foreign pipe": "pipe",
    }.get(name, file.name)  # fmt: skip
    assert named in printed
    step, state, said = resume(folder)
    assert step == (NEW if harmless else OLD) and named in said
    assert "WARNING" in said and damage.same(damage.make_state(step), state)
    assert (folder / "2.corrupt").exists() == (not harmless)
    assert resume(folder)[0] == step


def test_a_link_to_a_step_is_not_loaded(folder, tmp_path):
    (folder / str(NEW)).rename(tmp_path / "elsewhere")
    (folder / str(NEW)).symlink_to(tmp_path / "elsewhere")
    step, _, said = resume(folder)
    assert step == OLD and "it is a symbolic link to" in said
    assert (tmp_path / "elsewhere" / "_CHECKPOINT_METADATA").exists()


@pytest.mark.parametrize("verify", ["sizes", tiers.full("hashes")])
def test_flipped_bits_in_every_kind_of_file_are_found(folder, verify, monkeypatch):
    monkeypatch.setattr(damage, "resumed", lambda *args: damage_resumed(*args, verify=verify))
    table = damage.flip_all(folder, STATE, flips=1)
    assert len(table) >= 20
    for kind, (flips, by_resume, by_full, _, wrong) in table.items():
        assert (by_resume, by_full, wrong) == (flips, flips, 0), kind
    assert damage_resumed(folder, ABSTRACT)[0] == NEW  # as nothing is flipped any more


damage_resumed = damage.resumed


def test_without_a_good_step_a_run_refuses_to_start_again_and_again(folder):
    for step in (OLD, NEW):
        damage.flip(folder / str(step) / "_CHECKPOINT_METADATA", 99)
    for _ in range(2):  # the second time there are only the ones set aside
        with pytest.raises(
            ValueError, match=r"no good step left, only damaged ones \(.*1\.corrupt"
        ):
            opened(folder)[0].start(CONFIG)
    for path in folder.glob("*.corrupt"):
        shutil.rmtree(path)
    assert opened(folder)[0].start(CONFIG) is None


def test_arrays_that_come_back_changed_are_named_and_the_older_step_is_used(folder):
    (file,) = damage.kinds(folder)["2/params/ocdbt.process_N/d/* (over 1 MiB)"]
    damage.flip(file, 8_000_001)
    step, state, said = resume(folder)
    assert step == OLD and damage.same(damage.make_state(OLD), state)
    assert "tensor params/a.kernel is damaged: its checksum is" in said


def test_changed_model_files_are_named_before_they_are_used(folder, tmp_path):
    file = folder / model_files.NAME / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is longer than it was"):
        opened(folder)[0].start(CONFIG)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is longer than it was"):
        to_hf.export(folder, tmp_path / "out")
    shutil.rmtree(folder / model_files.NAME)
    with pytest.raises(ValueError, match="it has no model_files"):
        to_hf.export(folder, tmp_path / "out")


def test_an_export_of_a_damaged_step_names_the_tensor_and_the_other_steps(folder, tmp_path):
    (file,) = damage.kinds(folder)["2/params/ocdbt.process_N/d/* (over 1 MiB)"]
    damage.flip(file, 8_000_001)
    stored = step_folders.params(folder, NEW)
    problem = {
        name: orbax_io.problem(folder / str(NEW), f"params/{name}", stored[name]) for name in stored
    }
    assert problem["a.kernel"].startswith("tensor params/a.kernel is damaged: its checksum is")
    assert problem["b.scale"] == ""
    os.truncate(file, 10)
    with pytest.raises(ValueError, match=rf"{file.name} is truncated: 10 bytes, not[^$]*\[1, 2\]"):
        step_folders.params(folder, NEW)


def test_another_model_or_optimizer_is_refused_and_nothing_is_moved(folder):
    checkpoints, _ = opened(folder)
    found = checkpoints.start(CONFIG)
    assert found
    wrong = dict(ABSTRACT.params, extra=ABSTRACT.params["b.scale"])
    wrong["a.kernel"] = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=STATE.step.sharding)
    with pytest.raises(
        ValueError, match=r"params/a.kernel has shape \(1024, 1024\), not \(8, 8\); para"
    ):
        damage.restore(
            checkpoints, found, state.TrainState(ABSTRACT.step, wrong, ABSTRACT.opt_state)
        )
    assert resume(folder)[0] == NEW


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("jax_sft.checkpoint.resume.FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="format 2, this program knows 1: update"):
        opened(folder)[0].start(CONFIG)
    assert (folder / str(NEW)).exists()


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (saving.check_folder, lambda path: opened(path)[0].start(CONFIG)):
        with pytest.raises(ValueError, match="Not a directory"):
            make(tmp_path / "file" / "checkpoints")


# ---- saves that fail -------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str):
    """A mount for a while; only root may."""
    folder.mkdir(exist_ok=True)
    if os.geteuid():
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("noticed", ["before it is written", "while it is written"])
def test_a_full_disk_fails_the_save_and_nothing_else(tmp_path, noticed, monkeypatch):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=28m", "tmpfs") as small:
        checkpoints, said = opened(small, keep=1)
        checkpoints.start(CONFIG)
        damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)
        (small / "filling").write_bytes(bytes(shutil.disk_usage(small).free - 2_000_000))
        with monkeypatch.context() as patch:
            if noticed != "before it is written":
                patch.setattr(saving.Checkpoints, "_obstacle", lambda *_: "")
            damage.save(checkpoints, damage.make_state(2), CONFIG)
            checkpoints.close()
        assert (checkpoints.saved_step, checkpoints.failures) == (1, 1)
        message = "\n".join(said)
        assert "step 2 could NOT be saved" in message and "step 1 remains" in message
        expected = {"before it is written": "it needs 0.01 GB, 0.00 GB are free"}
        assert expected.get(noticed, "No space left on device") in message
        assert {path.name for path in small.iterdir()} == {"1", "filling"}
        with pytest.raises(saving.NotSaved, match="step 2 could not be saved") as error:
            checkpoints.require(2)
        assert exit_codes.of(error.value) == exit_codes.NOT_SAVED
        (small / "filling").unlink()
        damage.save(checkpoints, damage.make_state(3), CONFIG)  # the next one tries again
        checkpoints.require(3)
        assert resume(small)[0] == 3


def test_a_folder_that_becomes_read_only_fails_saves_until_it_is_mended(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40m", "tmpfs") as disk:
        checkpoints, said = opened(disk)
        checkpoints.start(CONFIG)
        damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        damage.save(checkpoints, damage.make_state(2), CONFIG)
        assert "Read-only file system" in "\n".join(said)
        for use in (saving.check_folder, lambda path: opened(path)[0].start(CONFIG)):
            with pytest.raises(ValueError, match="Read-only file system"):
                use(disk)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        damage.save(checkpoints, damage.make_state(3), CONFIG, wait=True)
        assert (checkpoints.saved_step, checkpoints.failures) == (3, 1)


def test_a_folder_that_is_removed_while_running_is_made_again(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / model_files.NAME, model)
    checkpoints = damage.open_folder(folder, model)
    checkpoints.start(CONFIG)
    shutil.rmtree(folder)
    damage.save(checkpoints, damage.make_state(3), CONFIG, wait=True)
    assert checkpoints.saved_step == 3 and model_files.verify(folder).problems == ()
    assert resume(folder)[0] == 3


def test_a_folder_that_is_removed_within_a_save_fails_that_save_only(tmp_path, monkeypatch):
    checkpoints, said = opened(tmp_path / "a")
    checkpoints.start(CONFIG)
    real = orbax_io.is_saved
    with monkeypatch.context() as patch:

        def removed(response, wait_s):
            done = real(response, wait_s)
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
            return done

        patch.setattr(orbax_io, "is_saved", removed)
        damage.save(checkpoints, damage.make_state(1), CONFIG)
        checkpoints.close()
    assert checkpoints.failures == 1 and "No such file or directory" in "\n".join(said)
    damage.save(checkpoints, damage.make_state(2), CONFIG, wait=True)
    assert checkpoints.saved_step == 2 and resume(tmp_path / "a")[0] == 2


def test_a_save_that_is_waited_for_is_tried_three_times(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PAUSES_S", (0, 0.01, 0.01))
    real, calls = orbax_io.start_saving, []

    def failing(*args):
        calls.append(args)
        if len(calls) % 3:
            raise orbax_io.Failed("OSError: Input/output error")
        return real(*args)

    monkeypatch.setattr(orbax_io, "start_saving", failing)
    checkpoints, said = opened(tmp_path)
    checkpoints.start(CONFIG)
    damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)
    assert (checkpoints.saved_step, checkpoints.failures, len(calls)) == (1, 2, 3)
    assert "Input/output error" in "\n".join(said)
    damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)  # is there
    assert len(calls) == 3
    monkeypatch.setattr(orbax_io, "start_saving", lambda *_: failing(calls.clear()))
    damage.save(checkpoints, damage.make_state(2), CONFIG, wait=True)
    assert (checkpoints.saved_step, checkpoints.failures) == (1, 5)


def test_a_save_that_hangs_ends_in_bounded_time(tmp_path, monkeypatch):
    checkpoints, said = opened(tmp_path)
    checkpoints.start(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "LEAST_BOUND_S", 0.3)
        patch.setattr(saving, "SLOWEST_BYTES_PER_S", 1e9)
        patch.setattr(orbax_io, "is_saved", lambda response, wait_s: time.sleep(wait_s))
        began = time.monotonic()
        damage.save(checkpoints, damage.make_state(1), CONFIG)
        checkpoints.close()
        assert time.monotonic() - began < 5
    assert "it was not written within 0 s" in "\n".join(said)
    damage.save(checkpoints, damage.make_state(2), CONFIG, wait=True)
    assert checkpoints.saved_step == 2


def test_a_save_waits_for_the_one_before_it(tmp_path, monkeypatch):
    real, running = orbax_io.is_saved, []

    def slow(response, wait_s):
        time.sleep(0.2)
        return real(response, wait_s)

    monkeypatch.setattr(orbax_io, "is_saved", slow)
    checkpoints, _ = opened(tmp_path, keep=3)
    checkpoints.start(CONFIG)
    for step in (1, 2, 3):
        damage.save(checkpoints, damage.make_state(step), CONFIG)
        running.append(checkpoints.saved_step)
    checkpoints.close()
    assert running == [None, 1, 2] and step_folders.present(tmp_path) == [3, 2, 1]


# ---- what may change between a checkpoint and the run that resumes it ----------------------------


def drifted(folder: Path, changes: dict, data: str = "", allow=(), **options):
    """Start with changed keys; return the lines said."""
    cfg = config.default()
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        target = cfg
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    said: list[str] = []
    keep = config.default().checkpoint
    keep.allow_changes = allow
    checkpoints = saving.Checkpoints(folder, keep, data=data, say=said.append, **options)
    checkpoints.start(config.to_dict(cfg))
    return "\n".join(said)


def test_what_cannot_change_the_training_may_change(saved):
    free = {"mesh.fsdp": 2, "log.every_steps": 3, "eval.every_steps": 7, "checkpoint.keep": 9}
    free |= {"batch.micro_rows": 8, "model.remat": "none", "model.attention": "reference"}
    free |= {"data.num_workers": 3, "data.cache_dir": "/x", "train.export": True}
    assert drifted(saved, free) == ""
    with pytest.raises(ValueError, match=r"batch\.micro_rows: 64 -> 8"):
        drifted(saved, free, bound=("batch.micro_rows",))
    assert drifted(saved, free | {"batch.micro_rows": 64}, bound=("batch.micro_rows",)) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"data.seq_len": 4096},
        {"data.train.more": config.source("x.jsonl")},
        {"data.eval.more": config.source("x.jsonl")},
        {"optimizer.learning_rate": 1e-4},
        {"optimizer.moments_dtype": "bfloat16"},
        {"train.steps": 7},
        {"train.epochs": 2.0},
        {"seed": 1},
        {"model.path": "other"},
        {"model.dtype": "float32"},
        {"loss.z_loss": 1e-4},
        {"batch.rows": 8},
    ],
)
def test_what_changes_the_training_is_refused_unless_allowed_by_key_or_prefix(saved, changes):
    (key,) = changes
    with pytest.raises(ValueError) as refused:
        drifted(saved, changes)
    message = str(refused.value)
    assert f"\n  {key}: " in message and " -> " in message
    assert f"--config.checkpoint.allow_changes=\"('{key}',)\"" in message
    said = drifted(saved, changes, allow=(key,))
    assert f"as allowed: {key}: " in said
    assert said == drifted(saved, changes, allow=(key.split(".")[0],))
    with pytest.raises(ValueError, match="differs in"):
        drifted(saved, changes, allow=("optimizer.b1", "los", key + "x"))


def test_changed_data_under_an_unchanged_config_are_refused(saved, tmp_path):
    checkpoints = saving.Checkpoints(tmp_path, config.default().checkpoint, data="before")
    checkpoints.start(CONFIG)
    damage.save(checkpoints, damage.make_state(1), CONFIG, wait=True)
    assert drifted(tmp_path, {}, data="before") == ""
    with pytest.raises(ValueError, match=r"\n  data: the files are not those"):
        drifted(tmp_path, {}, data="after")
    assert "as allowed: data: " in drifted(tmp_path, {}, data="after", allow=("data",))
    # What changed the data is named once, and allowed by its own name.
    said = drifted(tmp_path, {"data.seq_len": 8}, data="after", allow=("data.seq_len",))
    assert "as allowed: data.seq_len: 2048 -> 8" in said and "\n" not in said


def test_data_that_were_moved_resume_where_their_tokens_are_the_same(tmp_path):
    def cfg(path: str, **changes) -> dict:
        made = config.default()
        made.data.train.a = config.source(path, **changes)
        made.data.eval.b = config.source(path)
        return config.to_dict(made)

    def start(today: dict, data: str = "tokens", held: str = "held") -> str:
        said: list[str] = []
        options = {"data": data, "eval_data": {"b": held}, "say": said.append}
        checkpoints = saving.Checkpoints(tmp_path, config.default().checkpoint, **options)
        if checkpoints.start(today) is None:
            damage.save(checkpoints, damage.make_state(1), today, wait=True)
        return "\n".join(said)

    assert start(cfg("here.jsonl")) == ""
    said = start(cfg("there.csv", format="alpaca"))
    assert "moved   data.train.a.path: 'here.jsonl' -> 'there.csv': the tokens are the same" in said
    assert "moved   data.eval.b.path" in said and "moved   data.train.a.format" in said
    with pytest.raises(ValueError, match=r"data\.train\.a\.path") as refused:
        start(cfg("there.csv"), data="others")
    assert "data.eval" not in str(refused.value)
    with pytest.raises(ValueError, match=r"data\.eval\.b\.path"):
        start(cfg("there.csv"), held="others")
    with pytest.raises(ValueError, match=r"data\.train\.a\.epochs: 1\.0 -> 2\.0"):
        start(cfg("there.csv", epochs=2.0))


def test_the_advice_keeps_what_was_allowed_before(saved):
    changes = {"seed": 1, "train.steps": 7}
    with pytest.raises(ValueError, match=re.escape("allow_changes=\"('seed', 'train.steps')\"")):
        drifted(saved, changes, allow=("seed",))


def test_a_step_that_goes_while_it_is_read_is_not_called_damaged(tmp_path):
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
    used, said = [], []

    def use(step):
        used.append(step)
        if len(used) == 1:  # the run has saved the next one, and removes this
            (tmp_path / "3").mkdir()
            (tmp_path / "2").rmdir()
        if step != 3:
            raise ValueError(f"{step} is damaged")
        return step

    assert step_folders.newest_again(tmp_path, None, use, said.append) == 3 and used == [2, 3]
    assert said == ["step 2 was removed while it was read: taking the newest again"]
    for step in (1, 2):  # a step that is named, there or not
        with pytest.raises(ValueError, match=f"{step} is damaged"):
            step_folders.newest_again(tmp_path, step, use, said.append)


def test_a_step_of_an_older_format_names_it_and_stays(tmp_path):
    step = tmp_path / "7"
    step.mkdir()
    (tmp_path / model_files.NAME).mkdir()  # without a manifest, as it was then
    (step / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"format_version": 1}}')
    before = sorted(tmp_path.rglob("*"))
    for use in (lambda: opened(tmp_path)[0].start(CONFIG), lambda: model_files.verify(tmp_path)):
        with pytest.raises(
            ValueError, match=f"format 1, .*{step_folders.LAST_OF_FORMAT_1}"
        ) as refused:
            use()
        assert "remove" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_of_versions_with_and_without_a_clipping_part_restore_every_moment(tmp_path):
    rows = [ParamSpec("a.kernel", "a", "embed features -> embed features")]
    mesh = make_mesh({"fsdp": 8})
    params = {"a.kernel": STATE.params["a.kernel"]}

    def made(tx: optax.GradientTransformation) -> state.TrainState:
        current = state.create(tx, params, rows, mesh)
        current = dataclasses.replace(current, step=STATE.step)
        leaves, shape = jax.tree.flatten(current.opt_state)
        # Every leaf another, so that none can take another's place.
        leaves = [jax.device_put(leaf + n + 3, leaf.sharding) for n, leaf in enumerate(leaves)]
        return dataclasses.replace(current, opt_state=jax.tree.unflatten(shape, leaves))

    # Clipping was a part of the optimizer only where it was on. Now it always is.
    adamw = optax.adamw(lambda step: 0.1 * step, mask={"a.kernel": True})
    today = optim.make("float32", rows)
    with_clipping = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    assert [*made(with_clipping).named()] == [*made(today).named()] != [*made(adamw).named()]
    for name, before in (("clipped", with_clipping), ("not", adamw)):
        folder = tmp_path / name
        writer, _ = opened(folder)
        writer.start(CONFIG)
        damage.save(writer, made(before), CONFIG, wait=True)
        reader, _ = opened(folder)
        found = reader.start(CONFIG)
        assert found
        read, _ = damage.restore(reader, found, damage.abstract_of(made(today)))
        assert damage.same(read, made(today))


def test_changed_files_of_the_model_are_refused(folder, tmp_path):
    model = Path(shutil.copytree(folder / model_files.NAME, tmp_path / "model"))
    damage.open_folder(folder, model).start(CONFIG)
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model\.path: its files \['config\.json'\] were changed"):
        damage.open_folder(folder, model).start(CONFIG)
    damage.open_folder(folder, model, allow_changes=("model.path",)).start(CONFIG)


def test_a_config_of_an_older_program_lacks_keys_and_that_is_no_change():
    old = json.loads(json.dumps(CONFIG))
    del old["optimizer"]["clip_norm"], old["loss"]
    old["optimizer"]["gone"] = 3
    assert config.drift(old, CONFIG) == {}
    changed = json.loads(json.dumps(CONFIG))
    changed["loss"]["z_loss"] = 0.1
    assert [*config.drift(old, changed)] == ["loss.z_loss"]


def test_every_free_key_is_a_key():
    assert config.unknown(settings.free_keys()) == []
    assert config.unknown(("optimizer", "data.train.main.path", "data", "seed")) == []
    wrong = ("optimiser", "optimizer.lr", "data.trainer", "optimizer.", "")
    assert config.unknown(wrong) == [*wrong]


def test_verify_checkpoint_tells_good_from_damaged_and_a_wrong_path(folder, tmp_path, capsys):
    script = ["scripts/verify_checkpoint.py", "--checkpoint"]
    assert verify.verify(folder, None, True) == 0
    assert "step         2  good     17 files, 5 arrays" in capsys.readouterr().out
    assert verify.verify(tmp_path / "none", None, False) == 64
    assert verify.verify(folder, 3, False) == 64
    assert "has no step 3; it has [1, 2]" in capsys.readouterr().err
    os.truncate(folder / "2" / "params" / "_METADATA", 5)
    assert verify.verify(folder, OLD, False) == 0
    root = Path(verify.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *script, str(folder)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1 and "params/_METADATA is truncated: 5 bytes" in done.stdout
    assert jnp.isfinite(STATE.params["a.kernel"]).all()
