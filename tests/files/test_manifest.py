"""Manifests: every file that is not as it was written is named; nothing foreign is opened."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jax_sft.files import manifest


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of two processes, one of them large, each listed by its own."""
    folder = tmp_path / "step"
    rng = np.random.default_rng(0)
    for path, size in (
        ("_METADATA", 40),
        ("params/manifest.ocdbt", 100),
        ("params/ocdbt.process_0/d/aa", 3 * manifest.SMALL),
        ("params/ocdbt.process_1/d/bb", 50),
        ("empty", 0),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(rng.bytes(size))
    manifest.write(folder, 1, 2)
    manifest.write(folder, 0, 2, {"params/a": {"sum": 3}})
    return folder


def test_files_are_listed_by_the_process_that_wrote_them(folder):
    found = manifest.check(folder, hashes=True)
    assert found.problems == () and found.warnings == ()
    assert found.manifest and found.manifest.num_processes == 2
    assert found.manifest.arrays == {"params/a": {"sum": 3}}
    theirs = {path for path, name in found.manifest.file_of.items() if name == "manifest.1.json"}
    assert theirs == {"params/ocdbt.process_1/d/bb"} and len(found.manifest.files) == 5


def test_a_large_file_is_read_only_where_hashes_are_wanted(folder):
    file = folder / "params/ocdbt.process_0/d/aa"
    content = bytearray(file.read_bytes())
    content[2 * manifest.SMALL] ^= 1
    file.write_bytes(content)
    assert manifest.check(folder).problems == ()
    (problem,) = manifest.check(folder, hashes=True).problems
    assert problem.startswith("params/ocdbt.process_0/d/aa is damaged: its sha256")
    parts = [manifest.check(folder, True, (part, 3)).problems for part in range(3)]
    assert sorted(map(len, parts)) == [0, 0, 1]  # the processes share the work


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_foreign_or_edited_manifest_is_named(folder, number):
    file = folder / manifest.name(number)
    content = file.read_text()
    file.unlink()
    assert manifest.check(folder).problems == (f"{file.name} is missing",)
    file.write_text(content.replace('"process": ', '"process": 1'))
    assert f"{file.name} is damaged: its own checksum is wrong" in manifest.check(folder).problems
    for wrong in ("", "{", "[]", "null", "\x00", "[" * 100_000, '{"sha256": 1}', "1" * 10_000):
        file.write_text(wrong)
        (problem,) = manifest.check(folder).problems
        assert problem.startswith(f"{file.name} is damaged")
    file.write_text((folder / manifest.name(1 - number)).read_text() if number else content)
    assert bool(manifest.check(folder).problems) == bool(number)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": [1, "0"]}},
        {"files": {"/etc/passwd": [1, "0"]}},
        {"files": {"params/../../x": [1, "0"]}},
        {"files": []},
        {"files": {"a": 1}},
        {"num_processes": "2"},
        {"num_processes": 10**12},
        {"arrays": 3},
    ],
)
def test_a_manifest_made_to_do_harm_is_refused(folder, change):
    body = json.loads((folder / "manifest.0.json").read_text()) | change
    body.pop("sha256")
    body["sha256"] = manifest._own_sum(body)
    (folder / "manifest.0.json").write_text(json.dumps(body))
    (problem,) = manifest.check(folder).problems
    assert problem.startswith("manifest.")


def test_foreign_files_are_noted_and_pickles_links_and_pipes_refused(folder, tmp_path):
    (folder / "notes.txt").write_text("hello")
    found = manifest.check(folder)
    assert found.problems == ()
    assert found.warnings == ("notes.txt (5 bytes) is foreign: no manifest lists it",)
    for protocol in range(2, 6):
        (folder / "notes.txt").write_bytes(pickle.dumps([1], protocol))
        (problem,) = manifest.check(folder).problems
        assert "notes.txt" in problem and "pickle file, which can run code" in problem
    (folder / "notes.txt").unlink()
    for name in ("x.pkl", "pytorch_model.bin", "a.pt", "b.pth"):
        (folder / name).write_text("")
        (problem,) = manifest.check(folder).problems
        assert name in problem and "pickle" in problem
        (folder / name).unlink()
    os.mkfifo(folder / "pipe")  # opening it would block for ever
    assert manifest.check(folder).problems == ("pipe is neither a file nor a folder",)
    (folder / "pipe").unlink()
    target = tmp_path / "outside"
    (folder / "params/manifest.ocdbt").rename(target)
    (folder / "params/manifest.ocdbt").symlink_to(target)
    problems = manifest.check(folder).problems
    assert f"params/manifest.ocdbt is a symbolic link to {target}" in problems
    (tmp_path / "linked").symlink_to(folder)
    assert "symbolic link" in manifest.check(tmp_path / "linked").problems[0]


def test_sizes_name_what_is_cut_longer_or_missing(folder):
    os.truncate(folder / "_METADATA", 39)
    os.truncate(folder / "params/manifest.ocdbt", 101)
    (folder / "empty").unlink()
    assert sorted(manifest.check(folder).problems) == [
        "_METADATA is truncated: 39 bytes, not 40",
        "empty is missing (0 bytes)",
        "params/manifest.ocdbt is longer than it was: 101 bytes, not 100",
    ]
