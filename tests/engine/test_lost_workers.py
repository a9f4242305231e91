"""A process that loads data and dies stops the run in one sentence, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import conservtl as ctl
from conservtl.cli import _main
from conservtl.engine.lost_workers import between_steps, worker_error
from conservtl.errors import LostWorkerError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


class Rows(Dataset):
    """Examples; a worker that loads one a given number of times comes to an end."""

    def __init__(self, data, fault=None, at=18):
        self.data, self.fault, self.at, self.count = data, fault, at, 0

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        self.count += 1  # in each worker
        if self.fault is not None and get_worker_info() is not None and self.count == self.at:
            self.fault()
        return self.data[0][index], self.data[1][index]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    raise OSError("clip_7.wav: short read")


def out_of_memory():
    raise MemoryError("cannot allocate 3 GiB")


FAULTS = {
    killed: (
        LostWorkerError,
        r"the process \d+, which loads batches, (was killed \(Killed\)|ended), so training stopp",
    ),
    raises: (ctl.DataError, r"worker \d, which loads batches, raised OSError: clip_7\.wav: short read, so training"),
    out_of_memory: (LostWorkerError, r"worker \d, which loads batches, ran out of memory \(MemoryError: cannot alloc"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_and_goes_on(plain, data, same, tmp_path, fault):
    """One sentence, within seconds, and a checkpoint: the run that goes on is the one that never stopped."""
    training = ctl.Training(epochs=3, batch_size=8, lr=0.05, device="cpu", num_workers=1)
    small = data[0][:24], data[1][:24]
    whole, stopped = plain(), plain()
    ctl.fit(whole, Rows(small), training=training.model_copy(update={"num_workers": 0}), seed=3)
    kind, message = FAULTS[fault]
    begun = time.monotonic()
    with pytest.raises(kind, match=message) as raised:
        ctl.fit(stopped, Rows(small, fault, at=50), training=training, seed=3, out=tmp_path)
    assert time.monotonic() - begun < 30
    assert "\n" not in str(raised.value)
    assert (tmp_path / "checkpoint.pt").is_file()
    resumed = plain()
    ctl.fit(
        resumed, Rows(small), training=training.model_copy(update={"num_workers": 0}), seed=3, out=tmp_path, resume=True
    )
    assert same(resumed.model, whole.model)


def test_a_loader_of_ones_own_in_an_evaluation(plain, data, same, tmp_path):
    """The worker that loads a validation set dies: the epoch before it is trained, and not trained again."""

    def held_out(fault=None):
        return {"target": DataLoader(Rows(data, fault, at=60), 16, num_workers=1, persistent_workers=True)}

    training = ctl.Training(epochs=3, batch_size=16, device="cpu")
    whole, resumed = plain(), plain()
    ctl.fit(whole, data, {"target": data}, training, seed=3)
    with pytest.raises(LostWorkerError, match="which loads batches"):
        ctl.fit(plain(), data, held_out(killed), training, seed=3, out=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] in (4, 8)
    ctl.fit(resumed, data, {"target": data}, training, seed=3, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_the_command_says_one_sentence(capsys):
    def command(**_):
        raise worker_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"))

    assert _main._exit_code(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("conservtl: data: the process 7, which loads batches, was killed (Bus error), so ")
    assert said.count("\n") == 1


def test_other_errors_are_left_alone():
    assert worker_error(ValueError("DataLoader worker is a nice name")) is None
    pids = worker_error(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert "the process 12, 13, which loads batches, ended" in str(pids)


class TestBetweenSteps:
    @pytest.fixture
    def raising(self):
        """A handler as torch installs one: it raises wherever the main thread is."""

        def handler(*_):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

        before = signal.signal(signal.SIGCHLD, handler)
        yield handler
        signal.signal(signal.SIGCHLD, before)

    def test_the_block_ends_first(self, raising):
        done = []

        def step(error=None):
            with between_steps():
                signal.raise_signal(signal.SIGCHLD)
                done.append("step")
                if error is not None:
                    raise error

        with pytest.raises(RuntimeError, match="pid 7"):
            step()
        with pytest.raises(KeyError, match="own"):
            step(KeyError("own"))
        assert done == ["step", "step"]
        assert signal.getsignal(signal.SIGCHLD) is raising

    def test_a_handler_that_came_meanwhile_stays(self, raising):
        def other(*_):
            pass

        with between_steps():
            signal.signal(signal.SIGCHLD, other)
        assert signal.getsignal(signal.SIGCHLD) is other
