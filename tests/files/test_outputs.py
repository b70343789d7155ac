"""Nothing is removed that was not ours: where outputs may be, and what they may replace."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_sft.files import outputs, owner, sums

CALM = {"say": lambda _: None}


def write(out: Path, overwrite: bool = False, reads=(), say=print, names=(), **files: str) -> Path:
    """Write an output of some files, as the programs do."""
    files |= dict.fromkeys(names, "1")
    place = outputs.check(out, outputs.EXPORT, overwrite=overwrite, reads=reads)
    outputs.check_room(place.out, 0)
    with outputs.unfinished(place.out, say) as folder:
        for name, text in (files or {"config.json": '{"model_type": "qwen2"}'}).items():
            (folder / name).write_text(text)
        sums.write(folder, outputs.EXPORT, {"step": 1})
        outputs.put_in_place(folder, place)
    return place.out


def everything(folder: Path) -> dict[Path, tuple]:
    """What there is, down to inodes and contents."""
    return {
        path: (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run, a model, a conversion, a checkout, a folder of the user's; home is tmp_path/home."""
    files = {
        "run/config.json": "{}",
        "run/metrics.jsonl": "",
        "run/checkpoints/model_files/tensor_dtypes.json": "{}",
        "run/checkpoints/3/manifest.0.json": "{}",
        "starting/run.lock": "",
        "model/config.json": '{"model_type": "qwen2"}',
        "model/model.safetensors": "weights",
        "adapter/adapter_config.json": "{}",
        "new/run/checkpoints/model_files/tensor_dtypes.json": "{}",
        "checkout/.git/HEAD": "",
        "mine/README.md": "notes",
        "home/user/notes": "",
        "hub/models--a--b/blobs/x": "",
        "hub/models--a--b/snapshots/y/config.json": '{"model_type": "qwen2"}',
        "file": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path / "home/user"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "links").mkdir()
    (tmp_path / "starting/checkpoints").mkdir()
    for name in ("run", "run/checkpoints", "model", "mine", "home/user"):
        (tmp_path / "links" / name.replace("/", "-")).symlink_to(tmp_path / name)
    return tmp_path


REFUSED = {
    ".": "is or holds your home folder",
    "mine/.": "holds files that do not belong to an export",
    "/": "is or holds your home folder",
    "~": "is or holds your home folder",
    "home": "is or holds your home folder",
    "run": "is the folder of a run",
    "run/": "is the folder of a run",
    "new/../run/.": "is the folder of a run",
    "new": "holds files that do not belong to an export: run/",
    "run/checkpoints": "is a checkpoint folder",
    "run/checkpoints/3": "is a part of a checkpoint folder",
    "run/checkpoints/new": "is in a checkpoint folder",
    "run/checkpoints/3/params/new": "is in a part of a checkpoint folder",
    "starting": "is the folder of a run",
    "starting/checkpoints": "is a checkpoint folder",
    "model": "is a model folder",
    "model/sub": "is in a model folder",
    "model/a/b": "is in a model folder",
    "adapter": "is a model folder",
    "adapter/sub": "is in a model folder",
    "hub/models--a--b/blobs/new": "is in a model in the hub's cache",
    "checkout": "is a git checkout",
    "checkout/.git/new": "is in a git repository's own files",
    "mine": "holds files that do not belong to an export: README.md",
    "links/run": "is the folder of a run",
    "links/run-checkpoints/new": "is in a checkpoint folder",
    "links/model": "is a model folder",
    "links/model/sub": "is in a model folder",
    "links/mine": "holds files that do not belong to an export",
    "links/home-user": "is or holds your home folder",
    "file": "is a file",
    "": "is empty",
}


def test_no_output_is_holds_or_lies_in_what_is_not_ours(world):
    before = everything(world)
    for path, message in REFUSED.items():
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=message):
                outputs.check(path, outputs.EXPORT, overwrite=overwrite)
            with pytest.raises(ValueError) as error:
                outputs.check(path, outputs.CONVERSION, overwrite=overwrite)
            assert "overwrite" not in str(error.value)  # no advice that destroys
    assert everything(world) == before


@pytest.mark.parametrize(
    "path", ["out", "out/", "./a b/[1]/ü", "run/hf", "checkout/runs/hf", "~/hf", "empty"]
)
def test_a_new_or_empty_folder_is_written_wherever_it_is(world, path):
    (world / "empty").mkdir()
    write(Path(path))
    out = Path(path).expanduser()
    assert {file.name for file in out.iterdir()} == {"config.json", "SHA256SUMS"}
    assert not [*out.resolve().parent.glob(".*.jax_sft-*")]


def test_a_link_is_followed_once_and_stays(world):
    (world / "real").mkdir()
    (world / "out").symlink_to("real")
    (world / "later").symlink_to("not/there")
    for name in ("out", "later"):
        write(world / name)
        write(world / name, overwrite=True, a="new")
        assert (world / name).is_symlink() and (world / name / "a").read_text() == "new"


def test_an_older_output_is_replaced_only_when_asked(tmp_path):
    out = write(tmp_path / "out", a="old", b="old")
    with pytest.raises(ValueError, match="holds an older export.*--overwrite"):
        write(out, a="new")
    with pytest.raises(ValueError, match="holds an export, not a conversion"):
        outputs.check(out, outputs.CONVERSION, overwrite=True)
    with pytest.raises(ValueError, match="out/sub is in an export"):
        outputs.check(out / "sub", outputs.EXPORT, overwrite=True)
    with pytest.raises(ValueError, match="which is read"):  # the base model of a run, an export too
        write(out, overwrite=True, reads=[out])
    write(out, overwrite=True, a="new")
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != sums.NAME} == {
        "a": "new"
    }
    assert [*tmp_path.iterdir()] == [out]


CHANGES = {
    "README.md is foreign": lambda out: (out / "README.md").write_text("mine"),
    "notes/ is foreign": lambda out: (out / "notes").mkdir(),
    "link is foreign": lambda out: (out / "link").symlink_to("/"),
    "a was changed": lambda out: (out / "a").write_text("2ND"),
    "a is truncated: 1 bytes, not 3": lambda out: (out / "a").write_text("1"),
    "a is longer than it was": lambda out: (out / "a").write_text("longer"),
    "a is missing": lambda out: (out / "a").unlink(),
    "do not belong to an export": lambda out: (out / sums.NAME).unlink(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_an_output_that_somebody_changed_stays_and_the_change_is_named(tmp_path, message):
    out = write(tmp_path / "out", a="1st")
    place = outputs.check(out, outputs.EXPORT, overwrite=True)
    CHANGES[message](out)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(out, overwrite=True)
    with outputs.unfinished(out) as folder:  # it was changed after the check, during the export
        sums.write(folder, outputs.EXPORT, {})
        with pytest.raises(ValueError, match=message):
            outputs.put_in_place(folder, place)
    assert everything(tmp_path) == before


def test_a_failure_leaves_the_older_output_whole(tmp_path, monkeypatch):
    out = write(tmp_path / "out", a="old")
    before = everything(tmp_path)
    rename = os.rename

    def fails(source, target):
        if target == out and Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        write(out, overwrite=True)
    assert everything(tmp_path) == before


def test_of_two_outputs_at_once_the_later_one_is_refused(tmp_path):
    place = outputs.check(tmp_path / "out", outputs.EXPORT)
    with outputs.unfinished(place.out) as folder:
        sums.write(folder, outputs.EXPORT, {})
        write(tmp_path / "out", a="first")
        with pytest.raises(ValueError, match="by another program meanwhile"):
            outputs.put_in_place(folder, place)
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_mount_point_is_filled_and_replaced_from_within(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(outputs, "_is_mount", lambda folder: folder == out)
    inode = out.stat().st_ino
    for text in ("1st", "2nd"):
        write(out, overwrite=True, a=text)
        assert (out / "a").read_text() == text and out.stat().st_ino == inode
        assert {path.name for path in out.iterdir()} == {"a", sums.NAME}
    rename, before = os.rename, everything(out)
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):

        def fails(source, target, error=error):
            if target == out / sums.NAME and Path(source).parent.name == "new":
                raise error
            rename(source, target)

        monkeypatch.setattr(os, "rename", fails)
        with pytest.raises(type(error)):
            write(out, overwrite=True, a="3rd")
        assert everything(out) == before


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_what_a_killed_program_left_is_removed_and_the_living_ones_is_not(tmp_path, moment):
    out = write(tmp_path / "out", a="old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from jax_sft.files import outputs, sums\n"
        "place = outputs.check(sys.argv[1], outputs.EXPORT, overwrite=True)\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with outputs.unfinished(place.out) as folder:\n"
        "    (folder / 'a').write_text('half')\n"
        "    if sys.argv[2] == 'writing': die()\n"
        "    sums.write(folder, outputs.EXPORT, {})\n"
        "    rename = os.rename\n"
        "    os.rename = lambda old, new: (rename(old, new), die())\n"
        "    outputs.put_in_place(folder, place)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out), moment])
    assert done.returncode == -9 and len(left := [*tmp_path.glob(".out.jax_sft-*")]) == 1
    assert out.exists() == (moment == "writing")
    (tmp_path / ".out.jax_sft-00000000").mkdir()  # without our marker
    (tmp_path / ".other.jax_sft-00000000").mkdir()
    shutil.copy(left[0] / "owner.json", tmp_path / ".other.jax_sft-00000000")
    living = outputs.unfinished(out)
    said: list[str] = []
    with living:
        outputs.remove_leftovers(out, said.append)
        assert len([*tmp_path.glob(".*.jax_sft-*")]) == 3  # this one, and the two above
    assert (out / "a").read_text() == "old"
    assert write(out, overwrite=True, a="new") == out


def test_another_hosts_unfinished_output_is_removed_after_a_day_only(tmp_path, monkeypatch):
    out, said = tmp_path / "out", []
    left = tmp_path / ".out.jax_sft-12345678"
    (left / "new").mkdir(parents=True)
    elsewhere = owner.this_process() | {"host": "another", "out": "out"}
    (left / "owner.json").write_text(json.dumps(elsewhere))
    outputs.remove_leftovers(out, said.append)
    assert left.exists() and not said
    for path in (left / "owner.json", left / "new"):
        os.utime(path, (0, 0))
    outputs.remove_leftovers(out, said.append)
    assert not left.exists() and len(said) == 1 and str(left) in said[0]


def test_a_process_id_that_was_used_again_is_not_the_owner():
    mine = owner.this_process()
    assert owner.is_running(mine) is True
    assert owner.is_running(mine | {"started": "1"}) is False
    assert owner.is_running(mine | {"pid": 2**22 + 1}) is False
    assert owner.is_running(mine | {"host": "another"}) is None
    assert owner.is_running(mine | {"where": "another container"}) is None


def test_a_process_that_ended_does_not_run_before_its_parent_has_waited_for_it():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        start = owner.started(process.pid)
        assert start and owner.runs(process.pid, start) is True
        assert owner.runs(process.pid, "1") is False
        process.kill()
        deadline = time.monotonic() + 10
        while owner.started(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert owner.runs(process.pid, start) is False
    for pid in (0, -1, "1", 1 << 31, 1 << 80):
        assert owner.runs(pid, start) is False


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o027])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        out = write(tmp_path / "out", a="")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {0o666 & ~mask} and stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


def test_sha256sum_accepts_the_sums_and_odd_names(tmp_path):
    out = write(tmp_path / "out", names=("a b", "back\\slash", "new\nline", "ü"))
    found = sums.read(out)
    assert found and not sums.check(out, found) and found.about == {"step": 1}
    if shutil.which("sha256sum"):
        check = ["sha256sum", "-c", "--strict", "--quiet", sums.NAME]
        assert subprocess.run(check, cwd=out).returncode == 0


def test_sums_that_lead_out_of_their_folder_are_not_ours(tmp_path):
    out = write(tmp_path / "out", a="1")
    (tmp_path / "b").write_text("mine")
    text = (out / sums.NAME).read_text()
    for name in ("../b", str(tmp_path / "b")):
        (out / sums.NAME).write_text(text.replace("  a", f"  {name}").replace('"a"', f'"{name}"'))
        with pytest.raises(ValueError, match="do not belong to an export"):
            outputs.check(out, outputs.EXPORT, overwrite=True)


def test_a_folder_to_remove_files_in_must_be_new_or_marked(world):
    for name in ("mine", "run", "model", "."):
        with pytest.raises(ValueError, match="is not empty and was not written by this program"):
            outputs.claim(name, ".bench", "--work")
    assert outputs.claim("a/work", ".bench", "--work") == world / "a/work"
    (world / "a/work/runs").mkdir()
    assert outputs.claim("a/work", ".bench", "--work") == world / "a/work"


def test_a_file_replaces_only_one_of_the_same_program(world):
    def is_own_start(start: bytes) -> bool:
        return start.startswith(b"ours")

    (world / "page").write_text("ours: 1")
    (world / "train.jsonl").write_text('{"prompt": ""}')
    os.mkfifo(world / "pipe")
    for path in ("page", "fresh", "run/page", "a/b/c"):
        outputs.check_file(path, is_own_start, "--html")
    for path, message in {
        "train.jsonl": "this program did not write it",
        "model/config.json": "is in a model folder",
        "model/page": "is in a model folder",
        "run/checkpoints/3/page": "is in a part of a checkpoint",
        "mine": "is a folder",
        "pipe": "is not a regular file",
        "/dev/null": "is not a regular file",
    }.items():
        with pytest.raises(ValueError, match=message):
            outputs.check_file(path, is_own_start, "--html")
