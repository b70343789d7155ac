"""Big folders: conversion and export go through a model in blocks, and no bit is lost or added."""

import json
import math
import shutil
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import jax_sft
from jax_sft import config, convert, export, export_check, tiny, verify
from jax_sft.checkpoint import (
    array_checksums,
    from_hf,
    model_files,
    orbax_io,
    pretrained,
    saving,
    to_hf,
)
from jax_sft.files import manifest, step_folders, sums
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.training import state
from jax_sft.weights import blocks, hf_folder, hub, placement, vocabulary
from scripts import make_model
from tests import inputs

UNTIED = {"tie_word_embeddings": False, "model_type": "llama", "attention_bias": True}
WEIGHTS = "model.safetensors"
GATE = "model.layers.1.mlp.gate_proj.weight"
TEMPLATE = "additional_chat_templates/tool_use.jinja"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 3000 bytes: even the tiny model's matrices are cut, and not at equal parts."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(from_hf, "_ALIGNED", 4)
    monkeypatch.setattr(from_hf, "_LEAST_PIECE_BYTES", 500)


def add_template(folder: Path) -> Path:
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text("{{ tools }}")
    return folder


def assert_same_folder(before: Path, after: Path) -> None:
    """Every file the same to the last byte, but for the order in which tensors lie."""
    names = {path.relative_to(before) for path in before.rglob("*") if path.is_file()}
    written = {path.relative_to(after) for path in after.rglob("*") if path.is_file()}
    assert names == written - {Path(sums.NAME)}
    assert (listed := sums.read(after)) and not sums.check(after, listed)
    for name in names - {Path(WEIGHTS)}:
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    theirs, ours = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
        assert tensor.tobytes() == ours[name].tobytes(), name


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def run(script, monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    code = script.main()
    return code, *capsys.readouterr()


@inputs.needs_torch
@pytest.mark.parametrize("changes", [{}, UNTIED])
def test_a_folder_returns_to_the_last_byte(make_model, tmp_path, monkeypatch, capsys, changes):
    folder = add_template(make_model(dtype="BF16", **changes))
    converted, out = tmp_path / "converted", tmp_path / "out"
    done = run(convert, monkeypatch, capsys, f"--model={folder}", f"--out={converted}")
    assert done[:2] == (0, f"wrote {converted}\n")
    assert verify.verify(converted, None, full=True) == 0
    options = (f"--checkpoint={converted}", f"--out={out}", "--verify")
    code, printed, _ = run(export, monkeypatch, capsys, *options)
    assert code == 0 and printed.endswith("is allowed: the same\n")
    assert_same_folder(folder, out)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_plain_orbax_reads_what_was_converted_and_no_array_is_in_one_file(make_model, tmp_path):
    folder = make_model(dtype="BF16", **UNTIED)
    converted = from_hf.convert(folder, tmp_path / "converted", progress=False)
    planned = from_hf.plan(folder)
    params = ocp.load_checkpointables(str(converted / "0"))["params"]
    tensors = load_file(folder / WEIGHTS)
    for row in planned.specs:
        for index, name in row.hf_tensors(planned.axis_sizes):
            theirs = row.to_hf(np.asarray(params[row.path])[index], planned.axis_sizes)
            assert theirs.tobytes() == tensors[name].tobytes(), name
        if row.stacked:
            files = [*(converted / "0/params" / row.path).rglob("c/**/*")]
            assert sum(file.is_file() for file in files) >= planned.axis_sizes["layers"]


@pytest.mark.parametrize(
    ("vocab", "sizes"),
    [(272, {}), (269, {"fsdp": 4, "tensor": 2}), (269, {"fsdp": 2, "tensor": 4})],
)
def test_weights_load_alike_from_a_folder_and_from_checkpoints_and_return(
    make_model, tmp_path, vocab, sizes
):
    folder = make_model(dtype="BF16", **UNTIED, num_key_value_heads=4, vocab_size=vocab)
    converted = from_hf.convert(folder, tmp_path / "converted", progress=False)
    planned = from_hf.plan(folder)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    shardings = placement.shardings(planned.specs, mesh)
    shards = sizes.get("tensor", 1)
    what = planned.specs, planned.axis_sizes, False

    def find(path: Path, shards: int) -> pretrained.Weights:
        return pretrained.find(hf_folder.resolve(str(path)), *what, vocab_shards=shards)

    found = [find(path, shards) for path in (folder, converted)]
    assert found[0].dtypes == found[1].dtypes
    there, here = (weights.load(shardings, np.float32, False) for weights in found)
    padded = vocabulary.padded(planned.axis_sizes, shards)
    for row in planned.specs:
        array, of_converted = there[row.path], here[row.path]
        assert array.shape == row.shape(padded) and array.sharding == shardings[row.path]
        assert of_converted.sharding == array.sharding and of_converted.dtype == np.float32
        np.testing.assert_array_equal(of_converted, array)
    assert not np.asarray(there["embed.table"])[vocab:].any()
    assert not np.asarray(there["head.table"])[:, vocab:].any()
    # A run that stores them with their padding gives them back without.
    checkpoints = saving.Checkpoints(
        tmp_path / "run",
        config.default().checkpoint,
        model=model_files.Model(folder, found[0].dtypes),
        vocabulary=vocabulary.Vocabulary.of(planned.specs, vocab),
    )
    as_dict = config.to_dict(config.default())
    checkpoints.start(as_dict)
    step = jax.device_put(np.int32(1), rules.sharding(mesh))
    saved = state.TrainState(step, there, {"count": step})
    checkpoints.save(1, saved.named(), as_dict, wait=True)
    out = to_hf.export(tmp_path / "run", tmp_path / "out", progress=False)
    assert_same_folder(folder, out)
    one = placement.shardings(planned.specs, single_device_mesh())
    again, before = (find(p, 1).load(one, np.float32, False) for p in (tmp_path / "run", folder))
    for path, array in before.items():
        np.testing.assert_array_equal(again[path], array)


def test_training_starts_from_what_was_converted_and_its_export_loads(make_config, tmp_path):
    cfg = make_config(**{"train.steps": 1, "train.export": True, "mesh.fsdp": 1, "mesh.data": 8})
    folder = Path(cfg.model.path)
    cfg.model.path = str(from_hf.convert(folder, tmp_path / "converted", progress=False))
    assert math.isfinite(jax_sft.train(cfg, tmp_path / "run")["loss"])
    kept = [tmp_path / part / model_files.NAME for part in ("converted", "run/checkpoints")]
    assert manifest.check(kept[0]).manifest == manifest.check(kept[1]).manifest
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "run/export" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(np.abs(before[name] - after[name]).max() < 3e-3 for name in before)


def test_layers_of_several_dtypes_are_kept_exactly_and_restored(make_model, tmp_path):
    folder = make_model()
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16]
    rewrite(folder, lambda ts: {n: t.astype(dtypes[i % 3]) for i, (n, t) in enumerate(ts.items())})
    converted = from_hf.convert(folder, tmp_path / "converted", progress=False)
    assert_same_folder(folder, to_hf.export(converted, tmp_path / "out", progress=False))


def test_a_copied_head_of_a_tied_model_is_not_written_again(make_model, tmp_path):
    folder = make_model()
    tensors = load_file(folder / WEIGHTS)
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(copied, folder / WEIGHTS)
    converted = from_hf.convert(folder, tmp_path / "converted", progress=False)
    out = to_hf.export(converted, tmp_path / "out", progress=False)
    assert load_file(out / WEIGHTS).keys() == tensors.keys()


def test_a_chosen_dtype_is_that_of_all_arrays(make_model, tmp_path):
    folder = make_model()
    converted = from_hf.convert(folder, tmp_path / "converted", dtype="bfloat16", progress=False)
    assert {array["dtype"] for array in step_folders.params(converted, 0).values()} == {"bfloat16"}
    out = to_hf.export(converted, tmp_path / "out", progress=False)
    for name, tensor in load_file(folder / WEIGHTS).items():
        rounded = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(load_file(out / WEIGHTS)[name], rounded)


@pytest.mark.parametrize(
    "why,message",
    [
        ("not empty", "out holds files that do not belong to a conversion: mine. Choose another"),
        ("file", "out is a file"),
        ("no room", r"out will have 0\.00 GB, 0\.00 GB are free in"),
        ("float64", "embed.table is float64 in .*: choose a dtype"),
        ("converted", "is a checkpoint folder already"),
        ("misfit", "does not fit its config.json"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    make_model, tmp_path, monkeypatch, capsys, why, message
):
    folder, out = make_model(), tmp_path / "out"
    if why == "not empty":
        out.mkdir()
        (out / "mine").write_text("")
    elif why == "file":
        out.write_text("")
    elif why == "no room":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    elif why == "float64":
        rewrite(folder, lambda tensors: {n: t.astype(np.float64) for n, t in tensors.items()})
    elif why == "converted":
        folder = from_hf.convert(folder, tmp_path / "converted", progress=False)
    else:
        rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != GATE})
    before = sorted(tmp_path.rglob("*"))
    code, _, said = run(convert, monkeypatch, capsys, f"--model={folder}", f"--out={out}")
    assert code == 64
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_that_fails_leaves_nothing_and_what_was_there(
    make_model, tmp_path, monkeypatch, capsys
):
    folder, out = make_model(), tmp_path / "out"
    from_hf.convert(folder, out, dtype="bfloat16", progress=False)

    def stamps() -> set[tuple[Path, int, int]]:
        return {(path, path.lstat().st_ino, path.lstat().st_ctime_ns) for path in out.rglob("*")}

    before = stamps()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(orbax_io.Blocks, "write", full)
        options = (f"--model={folder}", f"--out={out}", "--overwrite")
        code, _, said = run(convert, monkeypatch, capsys, *options)
    assert code == 74 and "No space left on device" in said
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert stamps() == before
    assert run(convert, monkeypatch, capsys, *options)[0] == 0
    assert step_folders.params(out, 0)["embed.table"]["dtype"] == "float32"


def test_a_flipped_bit_is_named_by_export_and_by_training(make_model, tmp_path):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    file = next(path for path in (converted / "0/params/embed.table/c/1").rglob("*"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"c/1/0 is damaged: its sha256 is not that in"):
        to_hf.export(converted, tmp_path / "out", progress=False)
    for change in ("files", "arrays"):  # as if it had been flipped before it was hashed
        if change == "files":
            body = json.loads((converted / "0/manifest.0.json").read_text())
            manifest.write(converted / "0", arrays=body["arrays"])
        with pytest.raises(ValueError, match=r"embed\.table is damaged: its checksum is"):
            if change == "files":
                to_hf.export(converted, tmp_path / "out", progress=False)
            else:
                jax_sft.load(converted)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "converted"}


def test_an_export_of_float32_masters_reads_blocks_within_a_layer(make_model, tmp_path):
    folder = make_model(dtype="BF16", **UNTIED)
    planned = from_hf.plan(folder)
    shardings = placement.shardings(planned.specs, make_mesh({"fsdp": 4, "tensor": 2}))
    find = pretrained.find(folder, planned.specs, planned.axis_sizes, False)
    params = find.load(shardings, np.float32, False)
    step = tmp_path / "checkpoints/7"
    step.parent.mkdir()
    orbax_io.is_saved(
        orbax_io.start_saving(step, params, {"count": np.ones(1)}, {"step": 7}, 60), 60
    )
    sums = {path: jax_sft_sum(array) for path, array in params.items()}
    arrays = {
        f"params/{path}": {"shape": array.shape, "dtype": "float32", "sum": sums[path]}
        for path, array in params.items()
    }
    manifest.write(step, arrays=arrays)
    for name, array in arrays.items():
        stored = orbax_io.Stored(step, name, json.loads(json.dumps(array)))
        if stored.nbytes > blocks.BLOCK_BYTES and len(stored.shape) > 2:
            assert math.prod(stored.chunk) * 4 <= blocks.BLOCK_BYTES
            assert stored.chunk[0] == 1
    model_files.keep(step.parent, model_files.Model(folder, find.dtypes))
    out = to_hf.export(step.parent, tmp_path / "out", progress=False)
    assert_same_folder(folder, out)


def jax_sft_sum(array) -> int:
    return array_checksums.checksum(np.asarray(array))


def test_memory_of_both_ways_does_not_grow_with_the_model(tmp_path, monkeypatch):
    # Of a model of 68 MB whose largest stacked parameter takes 17 MB; tracing it takes some 3 MB.
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 17)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024}
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    tiny.write_model(folder, tiny.CONFIG | sizes | {"num_hidden_layers": 16})
    converted = tmp_path / "converted"
    tracemalloc.start()
    from_hf.convert(folder, converted, progress=False)
    to_hf.export(converted, tmp_path / "out", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_a_dry_run_lists_every_tensor_of_a_folder_that_has_no_content(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "sparse"
    make_model.make("72b", folder, headers_only=True)
    assert sum(file.stat().st_size for file in folder.iterdir()) > 145e9
    assert sum(512 * file.stat().st_blocks for file in folder.iterdir()) < 1e6
    code, printed, _ = run(convert, monkeypatch, capsys, f"--model={folder}", "--dry-run")
    *lines, total = printed.splitlines()
    assert code == 0 and len(lines) == 963 and "963 tensors, 145.412 GB" in total
    assert (
        "model.layers.79.mlp.up_proj.weight BF16 [29568, 8192] in model-00027-of-00038.safetensors"
        " -> layers.mlp.up.kernel[79] bfloat16 [8192, 29568]" in lines
    )
    (folder / "config.json").write_text(
        json.dumps(make_model.config_of("72b") | {"intermediate_size": 29_567})
    )
    code, _, said = run(convert, monkeypatch, capsys, f"--model={folder}", "--dry-run")
    assert code == 64 and "has shape (29568, 8192), config.json needs (29567, 8192)" in said


def test_a_dry_run_of_an_export_lists_what_the_export_then_has(
    make_model, tmp_path, monkeypatch, capsys
):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    options = (f"--checkpoint={converted}", "--shard-size=40KB", "--dtype=float16")
    code, printed, _ = run(export, monkeypatch, capsys, *options, "--dry-run")
    *lines, total, stops = printed.splitlines()
    assert (
        code == 0
        and "generation_config.json" in stops
        and total.startswith("step 0: 14 arrays -> 38 tensors, 0.000 GB in ")
    )
    out = to_hf.export(converted, tmp_path / "out", shard_bytes=40_000, dtype="float16")
    listed = [line.split(" -> ")[1].split(" ")[0] + line.split(" in ")[1] for line in lines]
    files = [*out.glob("*.safetensors")]
    assert sorted(listed) == sorted(n + file.name for file in files for n in load_file(file))


@inputs.needs_torch
def test_verify_finds_an_export_that_is_not_the_checkpoint(
    make_model, tmp_path, monkeypatch, capsys
):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    real = to_hf.export

    def wrong(*args, **options) -> Path:
        out = real(*args, **options)
        rewrite(out, lambda tensors: tensors | {GATE: 1.01 * tensors[GATE]})
        return out

    monkeypatch.setattr(to_hf, "export", wrong)
    # The sums of the files would tell it first.
    monkeypatch.setattr(export_check, "check_files", lambda _: 0)
    pushed = []
    monkeypatch.setattr(hub, "check", lambda *_: None)
    monkeypatch.setattr(hub, "push", lambda *args, **_: pushed.append(args))
    options = (f"--checkpoint={converted}", f"--out={tmp_path / 'out'}", "--push-to-hub=a/b")
    code, printed, _ = run(export, monkeypatch, capsys, *options, "--verify")
    assert code == 65 and "is allowed: NOT THE SAME" in printed and not pushed


def test_verify_without_torch_is_refused_before_the_export(
    make_model, tmp_path, monkeypatch, capsys
):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    monkeypatch.setattr(export_check.importlib.util, "find_spec", lambda _: None)
    options = (f"--checkpoint={converted}", f"--out={tmp_path / 'out'}", "--verify")
    code, _, said = run(export, monkeypatch, capsys, *options)
    assert code == 64 and "pip install torch" in said and not (tmp_path / "out").exists()


class FakeHub:
    """What huggingface_hub.HfApi does, noted."""

    def __init__(self, error: OSError | None = None):
        self.error, self.calls = error, []

    def whoami(self):
        if self.error:
            raise self.error
        return {"name": "me", "orgs": [{"name": "ours"}]}

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(
            ("upload", options["repo_id"], sorted(p.name for p in options["folder_path"].iterdir()))
        )
        return "https://hub/commit"


def test_an_export_is_uploaded_as_it_is_to_a_private_repository(
    make_model, tmp_path, monkeypatch, capsys
):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    fake = FakeHub()
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: fake)
    out = tmp_path / "out"
    options = (f"--checkpoint={converted}", f"--out={out}", "--push-to-hub=ours/model")
    code, printed, _ = run(export, monkeypatch, capsys, *options)
    assert code == 0 and printed.endswith("uploaded https://hub/commit\n")
    assert fake.calls == [
        ("create", "ours/model", {"private": True, "exist_ok": True}),
        ("upload", "ours/model", sorted(path.name for path in out.iterdir())),
    ]


@pytest.mark.parametrize(
    "repo,error,message",
    [
        ("model", None, "is not NAMESPACE/NAME"),
        ("not a name/x", None, "Repo id must use alphanumeric"),
        ("theirs/model", None, r"me cannot write to theirs/model: use one of \['me', 'ours'\]"),
        ("me/model", LocalTokenNotFoundError("no token"), "run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_an_upload_that_cannot_succeed_is_refused_before_the_export(repo, error, message):
    with pytest.raises(ValueError, match=message):
        hub.check(repo, FakeHub(error))


def test_an_upload_that_fails_says_that_the_export_is_there(tmp_path):
    with pytest.raises(hub.Failed, match="out was written, but uploading to me/x failed: cut off"):
        hub.push(tmp_path / "out", "me/x", api=FakeHub(OSError("cut off")))


def test_a_run_its_checkpoints_and_a_step_are_taken_everywhere(
    make_model, tmp_path, monkeypatch, capsys
):
    folder, run_folder = make_model(), tmp_path / "a [run] ü"
    from_hf.convert(folder, run_folder / "checkpoints", progress=False)
    (run_folder / "config.json").write_text('{"model": {}, "train": {}}')
    (tmp_path / "latest").symlink_to(run_folder / "checkpoints/0")
    monkeypatch.chdir(run_folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [".", "checkpoints", "checkpoints/0/", "../a [run] ü/checkpoints", "~/latest"]
    kept = run_folder / "checkpoints" / model_files.NAME
    for way in ways:
        assert hf_folder.resolve(way).samefile(kept) and hf_folder.step_of(way) in (None, 0)
        planned = to_hf.plan(way)
        assert (planned.folder.resolve(), planned.step) == (run_folder / "checkpoints", 0)
        code, printed, _ = run(verify, monkeypatch, capsys, f"--checkpoint={way}")
        assert code == 0 and printed.startswith("step         0  good")
    assert hf_folder.step_of("~/latest") == hf_folder.step_of("checkpoints/0") == 0
    wanted = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    loaded = jax_sft.load("checkpoints/0").params["embed.table"]
    np.testing.assert_array_equal(loaded, wanted)
    with pytest.raises(ValueError, match="is step 0, and --step=7 names another"):
        to_hf.plan("checkpoints/0", step=7)
    with pytest.raises(ValueError, match="has no step 7"):
        jax_sft.load(".", step=7)
    code, _, said = run(verify, monkeypatch, capsys, f"--checkpoint={tmp_path}")
    assert code == 64 and "has no steps" in said


def test_verify_export_names_what_is_not_as_it_was_written(
    make_model, tmp_path, monkeypatch, capsys
):
    converted = from_hf.convert(make_model(), tmp_path / "run/checkpoints", progress=False)
    out = to_hf.export(converted, tmp_path / "run/export", progress=False)
    capsys.readouterr()

    def check(folder: Path) -> tuple[int, str]:
        code, printed, said = run(verify, monkeypatch, capsys, f"--export={folder}")
        return code, printed + said

    for folder in (converted, out, tmp_path / "run"):
        code, text = check(folder)
        assert code == 0 and text.endswith("as they were written\n") and text.count("\n") == 1
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (out / WEIGHTS).write_bytes(content)
    (out / "generation_config.json").write_text("{")
    (out / "tokenizer.json").unlink()
    (out / "mine.py").write_text("")
    code, text = check(out)
    assert code == 1 and text.splitlines()[-1].endswith("4 DIFFER")
    for line in (
        "model.safetensors was changed: its sha256 is not that in SHA256SUMS",
        "generation_config.json is truncated: 1 bytes, not ",
        "tokenizer.json is missing (",
        "mine.py is foreign: SHA256SUMS does not list it",
    ):
        assert line in text
    (out / sums.NAME).write_text("nothing")
    assert check(out) == (1, f"{out / sums.NAME} is damaged, or another program wrote it\n")
    (out / sums.NAME).unlink()
    code, text = check(out)
    assert code == 64 and "has no SHA256SUMS" in text
    assert check(tmp_path / "nowhere")[0] == 64


def test_an_export_of_a_run_is_written_once_and_nothing_of_the_user_is_removed(
    make_model, tmp_path
):
    """As at the second start of a finished run with train.export."""
    run_folder, lines = tmp_path / "run", []
    converted = from_hf.convert(make_model(), run_folder / "checkpoints", progress=False)
    out = to_hf.export_run(run_folder, say=lines.append)
    written = (out / WEIGHTS).stat().st_ino
    (out / "README.md").write_text("mine")
    to_hf.export_run(run_folder, say=lines.append)
    assert (out / WEIGHTS).stat().st_ino == written and "README.md is foreign" in lines[-1]
    assert "holds step 0 already, and is left alone" in lines[-1]
    # Another state of the same step is not what is there.
    shutil.rmtree(converted)
    from_hf.convert(make_model("other", seed=1), run_folder / "checkpoints", progress=False)
    for refuse in (to_hf.export_run, to_hf.check_run_export):
        with pytest.raises(ValueError, match="README.md is foreign"):
            refuse(run_folder, say=lines.append)
    (out / "README.md").unlink()
    to_hf.check_run_export(run_folder, say=lines.append)
    to_hf.export_run(run_folder, say=lines.append)
    assert (out / WEIGHTS).stat().st_ino != written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("")
    shutil.rmtree(out)
    out.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="holds files that do not belong to an export: notes"):
        to_hf.check_run_export(run_folder)


def test_the_base_model_of_a_run_is_never_replaced_though_it_is_an_export(make_model, tmp_path):
    converted = from_hf.convert(make_model(), tmp_path / "converted", progress=False)
    base = to_hf.export(converted, tmp_path / "base", progress=False)
    with pytest.raises(ValueError, match="is .*base, which is read"):
        to_hf.export(converted, base, base=str(base), overwrite=True, progress=False)
    with pytest.raises(ValueError, match="which is read"):
        from_hf.convert(base, base, overwrite=True, progress=False)
    again = from_hf.convert(base, tmp_path / "converted", overwrite=True, progress=False)
    assert again == converted
