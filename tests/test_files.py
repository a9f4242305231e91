"""Atomic file writing."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conservtl.storage.files import atomic_path, write_bytes, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_utf8_with_its_own_line_endings_in_a_new_folder(tmp_path):
    write_text("Größe\n→ 1\r\n", tmp_path / "a" / "b" / "notes.txt")
    assert (tmp_path / "a" / "b" / "notes.txt").read_bytes() == "Größe\n→ 1\r\n".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    write_bytes(b"old", path)

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_failed_replacement_leaves_nothing(tmp_path):
    """A folder of that name cannot be replaced by a file."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text("x", tmp_path / "folder")
    assert names(tmp_path) == ["folder"]


def test_the_old_file_stays_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    write_bytes(b"old", path)
    fsync = os.fsync

    def spy(handle):
        fsync(handle)
        place = Path(f"/proc/self/fd/{handle}").resolve()
        seen.append((path.read_bytes(), place.read_bytes() if place.is_file() else place))

    monkeypatch.setattr(os, "fsync", spy)
    write_bytes(b"new", path)
    assert seen == [(b"old", b"new"), (b"new", tmp_path)]  # then the folder, whose entry is the new file's
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_a_new_file(tmp_path, umask, mode):
    """Whatever the writer does with the temporary file: safetensors replaces it by one of mode 0600."""
    before = os.umask(umask)
    try:
        write_text("x", tmp_path / "text")
        with atomic_path(tmp_path / "tensors") as temporary:
            save_file({"w": torch.ones(2)}, temporary)
        with atomic_path(tmp_path / "pickle") as temporary:
            torch.save({"w": torch.ones(2)}, temporary)
    finally:
        os.umask(before)
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)} == {
        "text": mode,
        "tensors": mode,
        "pickle": mode,
    }
    assert load_file(tmp_path / "tensors")["w"].tolist() == [1, 1]


def test_many_writers_of_one_file(tmp_path):
    """Each sees its own temporary file, so that the last one to finish wins."""
    contents = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_bytes(content, tmp_path / "file"), contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    write_text("x", tmp_path / ("n" * 255))
    assert names(tmp_path) == ["n" * 255]
