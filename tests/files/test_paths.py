"""Paths that a user gave: expanded in one place, which refuses what is no path of this machine."""

import os
from pathlib import Path

import pytest

from jax_sft.files import cache_folder, paths


def test_a_relative_path_is_below_the_working_folder_and_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/homes/me")
    assert paths.local("a b/[x]/é", "k") == tmp_path / "a b/[x]/é"
    assert paths.local("~/run", "k") == Path("/homes/me/run")
    assert paths.local("./s3:/x", "k") == tmp_path / "s3:/x"


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "is empty"),
        ("s3://bucket/run", "is a URL"),
        (Path("gs://bucket/run"), "is a URL"),
        ("file:///tmp/x", "is a URL"),
        (" s3://bucket/run", "is a URL"),
        ("a\0b", "NUL byte"),
        ("x" * 256, "over 255 bytes"),
        ("x/" * 2000, "too long"),  # steps in it would be
        ("~no-such-user/x", "home folder ~no-such-user is not known"),
    ],
)
def test_what_is_no_path_here_is_refused_by_key(text, why):
    with pytest.raises(ValueError, match=why) as raised:
        paths.local(text, "data.train.x.path")
    assert "data.train.x.path" in str(raised.value)


def test_without_a_home_the_caches_are_in_a_private_temporary_folder(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(cache_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    uid = 54321  # has no entry in the password database
    (theirs := tmp_path / f"jax_sft-{uid}").mkdir()
    with pytest.raises(ValueError, match="set HOME, or XDG_CACHE_HOME"):
        cache_folder.default()
    with pytest.raises(ValueError, match="set HOME, or write the path without it"):
        paths.local("~/run", "--workdir")
    theirs.rmdir()
    folder = tmp_path / f"jax_sft-{uid}"
    monkeypatch.setattr(cache_folder, "_private", lambda folder: folder)
    assert cache_folder.default() == folder
