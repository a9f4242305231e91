"""A full disk, a read-only folder: one error that names the file; what was there before is unchanged."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conservtl as ctl
from conservtl.errors import WriteError
from conservtl.experiments.studies.study_storage import opened_storage
from conservtl.storage.files import write_text
from conservtl.storage.tensor_files import load_tensors, save_tensors


@pytest.fixture
def small(tmp_path):
    """A file system of 256 KiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs Linux and its permission")
    yield place
    gc.collect()  # an error that a test caught may hold a file open
    subprocess.run(["umount", str(place)], check=True)


def adaptation(width: int) -> ctl.Adaptation:
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    return ctl.adapt(torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2)), source)


DATA = (torch.randn(16, 4), torch.randint(2, (16,)))
TRAINING = {"epochs": 3, "batch_size": 8, "device": "cpu"}


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small):
    """The first run's fits, also while the disk is nearly full; a larger model's does not."""
    ctl.fit(adaptation(16), DATA, training=ctl.Training(**TRAINING), out=small)
    before = (small / "checkpoint.pt").read_bytes()
    with pytest.raises(WriteError, match=r"checkpoint\.pt' must be writable; .*Earlier files are unchanged"):
        ctl.fit(adaptation(20_000), DATA, training=ctl.Training(**TRAINING), out=small)
    assert (small / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in small.iterdir()) == ["checkpoint.pt", "history.jsonl"]
    ctl.fit(adaptation(16), DATA, training=ctl.Training(**TRAINING), out=small, resume=True)


def test_text_and_tensors_that_do_not_fit(small):
    save_tensors({"w": torch.ones(3)}, small / "t.safetensors")
    write_text("old", small / "notes")
    with pytest.raises(WriteError, match=r"t\.safetensors' must be writable; received: .*No space left on device"):
        save_tensors({"w": torch.ones(100_000)}, small / "t.safetensors")
    with pytest.raises(WriteError, match="notes' must be writable; received: No space left on device"):
        write_text("x" * 300_000, small / "notes")
    assert torch.equal(load_tensors(small / "t.safetensors")["w"], torch.ones(3))
    assert (small / "notes").read_text() == "old"
    assert sorted(path.name for path in small.iterdir()) == ["notes", "t.safetensors"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_folder_in_which_nobody_can_write():
    with pytest.raises(WriteError, match="/proc/self/notes' must be writable"):
        write_text("x", "/proc/self/notes")


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    """It was deleted between two epochs; the run goes on, and its files are complete."""

    def deleting(_: object) -> None:
        for file in list((tmp_path / "out").iterdir()):
            file.unlink()
        (tmp_path / "out").rmdir()

    ctl.fit(adaptation(4), DATA, training=ctl.Training(**TRAINING), out=tmp_path / "out", tell=deleting)
    with pytest.raises(ctl.SpecError, match="there is no checkpoint"):
        ctl.fit(adaptation(4), DATA, training=ctl.Training(**TRAINING), out=tmp_path / "out", resume=True)


def test_a_study_whose_disk_is_full(small):
    """While it is created, and later: one error that names the file; then it goes on with what it had."""
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{small / 'study.db'}"
    (small / "filling").write_bytes(bytes(200_000))
    with pytest.raises(WriteError, match=r"study\.db' must be writable; .*disk is full"), opened_storage(url):
        pass
    gc.collect()  # that error holds the file open, whose place would be free only later
    for file in small.iterdir():
        file.unlink()

    def fill():
        with opened_storage(url) as storage:
            study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
            finished.append(sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)))
            for number in range(2000):
                study.add_trial(optuna.create_trial(value=float(number), user_attrs={"note": "x" * 1500}))
                finished[-1] += 1

    finished = []
    with pytest.raises(WriteError, match=r"study\.db' must be writable; .*disk is full"):
        fill()
    with pytest.raises(WriteError):
        fill()
    assert 0 < finished[0] <= finished[1] <= finished[0] + 1
