"""Files are written whole, and folders that cannot be written are found before they are needed."""

import io
import os

import numpy as np
import pytest

from jax_sft.files.disk import probe_folder, sync, write_all, write_at


class Slow(io.RawIOBase):
    """Takes at most 3 bytes at a time, as a disk that is nearly full may."""

    def __init__(self):
        self.taken = b""

    def write(self, given) -> int:
        self.taken += bytes(given)[:3]
        return min(len(given), 3)


def test_all_bytes_are_written_however_few_a_call_takes(tmp_path, monkeypatch):
    stream = Slow()
    write_all(stream, b"ten bytes!")
    assert stream.taken == b"ten bytes!"
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, left, offset: pwrite(fd, left[:3], offset))
    file = tmp_path / "a"
    file.write_bytes(b"0123456789ab")
    with open(file, "r+b") as opened:
        write_at(opened.fileno(), np.arange(8, dtype=np.uint8).data, 2)
        write_at(opened.fileno(), np.zeros(0, np.uint8).data, 0)
    assert file.read_bytes() == b"01" + bytes(range(8)) + b"ab"


def test_a_folder_is_probed_for_writing_and_nothing_is_left_in_it(tmp_path, monkeypatch):
    probe_folder(tmp_path / "new" / "inner")
    assert [*(tmp_path / "new" / "inner").iterdir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        probe_folder(tmp_path / "file")

    def refuse(_descriptor):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        probe_folder(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["inner"]


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a").write_text("")
    for path in (tmp_path, tmp_path / "a"):
        sync(path)
    assert synced == [path.stat().st_ino for path in (tmp_path, tmp_path / "a")]
