"""One run per workdir at a time: a live holder is never disturbed, a dead one never in the way."""

import dataclasses
import json
import os
import subprocess
import threading
import time

import pytest

from jax_sft.files import owner, run_lock
from jax_sft.files.run_lock import NAME, Refused, RunLock


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.2)
    monkeypatch.setattr(run_lock, "GRACE_S", 0.0)
    monkeypatch.delenv("JAX_SFT_ATTEMPT", raising=False)


def write_lock(folder, **changes) -> None:
    """Leave the lock of a process that is not this one."""
    holder = dataclasses.replace(run_lock._this_process(), token="other", **changes)
    (folder / NAME).write_text(f"{json.dumps(dataclasses.asdict(holder))}\n{0:020}\n")


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_with_the_holder_and_the_lock_goes_with_the_first(tmp_path):
    with RunLock(tmp_path), pytest.raises(Refused) as refused:
        RunLock(tmp_path).__enter__()
    assert f"in use by process {os.getpid()} on host " in str(refused.value)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("how", ["ended", "killed and not waited for", "id used again"])
def test_the_lock_of_a_dead_process_here_is_taken_at_once(tmp_path, how):
    process = subprocess.Popen(["sleep", "60"])
    write_lock(tmp_path, pid=process.pid, started=owner.started(process.pid))
    with pytest.raises(Refused):
        RunLock(tmp_path).__enter__()
    process.kill()
    if how == "ended":
        process.wait()
    elif how == "id used again":
        write_lock(tmp_path, started="1")
    else:
        while owner.started(process.pid):
            time.sleep(0.01)
    said: list[str] = []
    began = time.monotonic()
    with RunLock(tmp_path, said.append) as lock:
        assert time.monotonic() - began < run_lock.WATCH_S / 2
        lock.check(look=True)
    assert len(said) == 1 and "is stale (that process is gone)" in said[0]
    process.wait()


@pytest.mark.parametrize("text", [None, "", "null", "{}", '{"host": 3}', "\x00" * 9000, "[" * 999])
def test_what_cannot_be_seen_from_here_is_stale_once_it_was_not_refreshed(tmp_path, text):
    if text is None:
        write_lock(tmp_path, machine="another", host="elsewhere", time="2999-01-01 00:00:00 UTC")
    else:
        (tmp_path / NAME).write_text(text)
    (tmp_path / NAME).chmod(0o444)
    os.utime(tmp_path / NAME, (2**33, 2**33))
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert "silent" in said[-1] and ("elsewhere" in said[-1]) == (text is None)
    assert [*tmp_path.iterdir()] == []


def test_a_holder_elsewhere_that_refreshes_its_lock_is_left_alone(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:
        monkeypatch.setattr(run_lock, "_is_alive", lambda _: None)
        with pytest.raises(Refused, match="in use by"):
            RunLock(tmp_path).__enter__()
        lock.check(look=True)


def test_a_restarted_run_waits_for_its_predecessor_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_SFT_ATTEMPT", "1")
    process = subprocess.Popen(["sleep", "0.4"])
    write_lock(tmp_path, pid=process.pid, started=owner.started(process.pid))
    with RunLock(tmp_path):
        assert owner.started(process.pid) == ""  # ended; waited for below
    process.wait()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_lock_file_is_named_and_left_alone(tmp_path, kind):
    path = tmp_path / NAME
    makes = {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("x"),
        "pipe": lambda: os.mkfifo(path),
    }
    makes[kind]()
    with pytest.raises(Refused, match="remove it"):
        RunLock(tmp_path).__enter__()
    assert [*tmp_path.iterdir()] == [path]


def test_of_many_newcomers_at_a_stale_or_a_free_lock_one_wins(tmp_path):
    for turn in range(40):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if turn % 2:
            write_lock(folder, pid=dead_pid(), started="1")
        locks = [RunLock(folder, lambda _: None) for _ in range(6)]
        won, start = [], threading.Barrier(len(locks))

        def enter(lock, start=start, won=won):
            start.wait()
            try:
                won.append(lock.__enter__())
            except Refused:
                return

        threads = [threading.Thread(target=enter, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check(look=True)
        won[0].release()
        assert [*folder.iterdir()] == []


def test_a_holder_that_was_taken_over_while_it_slept_stops_and_leaves_the_new_one_alone(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.check(look=True)
        write_lock(tmp_path, host="newcomer")
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(Refused, match="was taken over by process .* on host newcomer"):
            lock.check(look=True)
    assert (tmp_path / NAME).read_bytes() == before


def test_a_lock_that_is_removed_with_its_folder_comes_back(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder):
        (folder / NAME).unlink()
        folder.rmdir()
        deadline = time.monotonic() + 5
        while not (folder / NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(Refused):
            RunLock(folder).__enter__()
    assert [*folder.iterdir()] == []


def test_a_process_that_is_told_to_end_at_once_leaves_no_lock(tmp_path, monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with RunLock(tmp_path):
        run_lock.end_process(75)
        assert [*tmp_path.iterdir()] == [] and ended == [75]
