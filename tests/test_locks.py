"""Locks on folders, held against other processes and released by those that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

import conservtl as ctl
from conservtl.errors import WriteError
from conservtl.storage import locks
from conservtl.storage.locks import is_locked, lock_folder, wait_for_lock

HOLD = """
import sys, time
from pathlib import Path
from conservtl.storage.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def taken(folder):
    with lock_folder(folder):
        pass


def test_a_second_process_is_refused_by_the_first_ones_number_and_welcome_after_its_death(tmp_path, holder):
    with pytest.raises(ctl.SpecError, match=rf"must have one writer; process {holder.pid} on .+ \(since 20"):
        taken(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_is_held_within_a_process_too_and_released_by_an_error(tmp_path):
    def fail():
        with lock_folder(tmp_path):
            with pytest.raises(ctl.SpecError, match=f"process {os.getpid()} on"):
                taken(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    taken(tmp_path)


def test_the_temporary_files_of_a_killed_process_are_deleted(tmp_path):
    (tmp_path / ".0123456789abcdef.conservtl-tmp").write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_bytes(b"of somebody else")
    with lock_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.json", ".notes.tmp"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ctl.SpecError, match=r"is a file\. Give a folder"):
        taken(tmp_path / "file")
    with pytest.raises(WriteError, match="must be writable"):
        taken(tmp_path / "file" / "below")


def test_those_that_wait_come_one_after_the_other(tmp_path):
    """Each thread reads and writes a counter; without the lock, writes would be lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add() -> None:
        for _ in range(20):
            with wait_for_lock(tmp_path / ".made.lock"):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "80"


def test_a_lock_is_held_as_long_as_its_process_lives_whatever_its_note_says(tmp_path, holder):
    (tmp_path / ".lock.json").write_text('{"process": 1')
    with pytest.raises(ctl.SpecError, match="must have one writer; another process writes to it"):
        taken(tmp_path)
    assert is_locked(tmp_path / ".lock")
    assert not is_locked(tmp_path / "none")
    holder.kill()
    holder.wait()
    assert not is_locked(tmp_path / ".lock")


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch):
    def unsupported(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(locks.FileLock, "acquire", unsupported)
    with pytest.warns(UserWarning, match="this file system has no locks; let no two runs write to it"):
        taken(tmp_path)
    with pytest.warns(UserWarning, match="has no locks"), wait_for_lock(tmp_path / "cache" / ".lock"):
        pass
    assert is_locked(tmp_path / ".lock")
