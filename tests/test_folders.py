"""A folder is written as a whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import conservtl as ctl
from conservtl.errors import WriteError
from conservtl.storage import folders
from conservtl.storage.folders import atomic_folder, check_replaceable


@pytest.fixture
def old(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "card.md").write_text("old")
    return tmp_path / "out"


def written(folder):
    with atomic_folder(folder) as place:
        (place / "card.md").write_text("new")


def test_the_whole_folder_is_replaced(old):
    (old / "more.md").write_text("of before")
    written(old)
    assert [path.name for path in old.iterdir()] == ["card.md"]
    assert (old / "card.md").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(28, "No space left on device"), WriteError("'x' full.")])
def test_an_error_in_the_block_leaves_the_old_folder(old, error):
    def fail():
        with atomic_folder(old) as place:
            (place / "card.md").write_text("half")
            raise error

    expected = WriteError if isinstance(error, OSError | WriteError) else type(error)
    with pytest.raises(expected):
        fail()
    assert (old / "card.md").read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_a_failure_between_the_two_moves_puts_the_old_folder_back(old, monkeypatch):
    """The second move is the one into the place of the folder."""
    moves, move = [], Path.rename

    def rename(path, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(folders, "_exchanged", lambda *_: False)
    with pytest.raises(WriteError, match=r"out' must be writable; received: Input/output error"):
        written(old)
    assert len(moves) == 3
    assert (old / "card.md").read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems exchange nothing")
def test_the_folder_is_there_at_each_moment(old, monkeypatch):
    """One call of the system puts the new folder into the place of the old one, which goes with the temporary one."""
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the folder was away for a moment"))
    written(old)
    assert (old / "card.md").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_what_cannot_be_exchanged(tmp_path):
    assert not folders._exchanged(tmp_path / "none", tmp_path / "nor this")


def test_a_message_names_the_folder_and_not_the_temporary_one(old):
    def fail():
        with atomic_folder(old) as place:
            raise WriteError(f"{str(place / 'card.md')!r} must be writable.")

    with pytest.raises(WriteError, match=f"^'{old}/card.md' must be writable"):
        fail()


def test_what_may_be_replaced(old, tmp_path):
    check_replaceable(tmp_path / "new", ["*.md"], overwrite=False)
    check_replaceable(old, ["*.md"], overwrite=True)
    with pytest.raises(ctl.SpecError, match=r"must be empty or new; it holds card\.md"):
        check_replaceable(old, ["*.md"], overwrite=False)
    (old / "thesis.tex").write_text("")
    with pytest.raises(ctl.SpecError, match=r"if it holds nothing else; it holds thesis\.tex too"):
        check_replaceable(old, ["*.md"], overwrite=True)
    with pytest.raises(ctl.SpecError, match=r"card\.md' must be a folder; it is a file"):
        check_replaceable(old / "card.md", ["*.md"], overwrite=True)
