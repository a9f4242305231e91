"""``fit(log=...)``: Accelerate's trackers get each epoch's numbers at its step."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import conservtl as ctl
from conservtl.compat import accelerate_states


class Kept(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self):
        super().__init__(_blank=True)
        self.config, self.lines, self.finished = None, [], 0

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.lines.append((step, dict(values)))

    def finish(self):
        self.finished += 1


@pytest.fixture
def own_accelerator():
    """Return a function that makes an Accelerator, whose shared state ends with the test."""
    shared = accelerate_states(process=True)
    states = [dict(state) for state in shared]
    yield lambda **options: Accelerator(cpu=True, **options)
    for state, before in zip(shared, states, strict=True):
        state.clear()
        state.update(before)


def fit(adaptation, data, **options):
    training = ctl.Training(epochs=2, batch_size=16, ema=0.5, device="cpu")
    return ctl.fit(adaptation, data, {"target": data}, training, watch={"source": data}, seed=0, **options)


def expected(result):
    """The finite numbers of each line, by path; the sets that select are not there twice."""
    lines = []
    for line in result.history:
        sets = {f"{name}/{key}": value for name in ("target", "source") for key, value in line[name].items()}
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        lines.append((line["step"], {**numbers, **sets}))
    return lines


def test_each_epochs_numbers_at_its_step(plain, data):
    tracker, told = Kept(), []
    result = fit(plain(ctl.L2SP(), ctl.Mixout()), data, log=tracker, tell=told.append, optimizer=torch.optim.NAdam)
    assert tracker.lines == expected(result)
    assert told == list(result.history)
    assert tracker.finished == 1
    assert tracker.config["strategies"] == "l2_sp, mixout"
    assert tracker.config["optimizer"] == "torch.optim.nadam.NAdam"
    assert tracker.config["epochs"] == 2
    assert tracker.config["ema"] == 0.5
    assert all(isinstance(value, (bool, int, float, str)) for value in tracker.config.values())


def test_several_and_tensorboards_files(plain, data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = Kept()
    result = fit(plain(), data, log=["tensorboard", tracker], out=tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "conservtl")).Reload()
    for name in ("target/accuracy", "source/loss", "loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(values[name])) for step, values in tracker.lines]
    assert len(result.history) == len(tracker.lines)


def test_the_trackers_of_a_given_accelerator(plain, data, own_accelerator):
    """Started and finished by its owner, or by the run if nobody started them."""
    begun, lazy = Kept(), Kept()
    accelerator = own_accelerator(log_with=begun)
    accelerator.init_trackers("mine")
    result = fit(plain(), data, accelerator=accelerator)
    assert begun.lines == expected(result)
    assert (begun.finished, begun.config) == (0, None)
    result = fit(plain(), data, accelerator=own_accelerator(log_with=lazy))
    assert lazy.lines == expected(result)
    assert lazy.finished == 1


def test_trackers_are_finished_after_an_error(plain, data):
    tracker = Kept()
    with pytest.raises(ctl.TrainingDivergedError):
        fit(plain(), (data[0] * torch.nan, data[1]), log=tracker)
    assert tracker.finished == 1


def test_trials_of_a_search_are_not_logged(plain, data):
    tracker = Kept()
    fit(plain(ctl.SurgicalFineTuning(block="best")), data, log=tracker)
    assert len(tracker.lines) == 2


def test_what_cannot_be_logged_is_refused(plain, data, own_accelerator, monkeypatch):
    with pytest.raises(ctl.SpecError, match=r"log: 'tensorbord' is none of .*Did you mean 'tensorboard'"):
        fit(plain(), data, log="tensorbord")
    with pytest.raises(ctl.SpecError, match=r"log: tensorboard writes files.*Pass out="):
        fit(plain(), data, log="tensorboard")
    with pytest.raises(ctl.SpecError, match="a given accelerator says where to log"):
        fit(plain(), data, log=Kept(), accelerator=own_accelerator())
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ctl.MissingExtraError, match="log='wandb' needs its package"):
        fit(plain(), data, log="wandb")
    with pytest.raises(ctl.MissingExtraError, match=r"pip install 'conservtl\[tensorboard\]'"):
        fit(plain(), data, log="tensorboard")
