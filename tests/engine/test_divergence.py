"""A run that diverges stops, names the place and leaves the last good checkpoint."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.plan import Penalty


def spoiling(at, value=float("nan")):
    """A loss that is replaced by another value in its n-th call."""
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        found = F.cross_entropy(outputs, batch[1])
        return found * value if calls == at else found

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_place_is_named(plain, data, value):
    """With four batches per epoch the 7th is the 3rd of the second epoch, and the 7th step."""
    with pytest.raises(ctl.TrainingDivergedError, match=rf"loss is {value} at batch 3 of epoch 2 \(step 7, examples "):
        ctl.fit(plain(), data, training=ctl.Training(epochs=3, batch_size=16), loss=spoiling(7, value))


def test_the_place_is_named_under_accumulation(plain, data):
    """With groups of three, two steps per epoch, the 7th batch belongs to the 3rd step."""
    with pytest.raises(ctl.TrainingDivergedError, match=r"batch 3 of epoch 2 \(step 3,"):
        ctl.fit(plain(), data, training=ctl.Training(epochs=3, batch_size=16, accumulate=3), loss=spoiling(7))


def test_examples_are_the_ones_in_the_batch(plain, data):
    """An example that is itself NaN is among those named."""
    inputs, labels = data[0][:16].clone(), data[1][:16]
    inputs[11] = torch.nan
    with pytest.raises(ctl.TrainingDivergedError) as raised:
        ctl.fit(plain(), (inputs, labels), training=ctl.Training(epochs=1, batch_size=4))
    named = str(raised.value).split("examples ")[1].split(")")[0]
    assert "11" in named.split(", ")


def test_streamed_data_names_the_batch(plain, data):
    batches = [(data[0][:8], data[1][:8]), (data[0][:8] * torch.nan, data[1][:8])]
    with pytest.raises(ctl.TrainingDivergedError, match=r"batch 2 of epoch 1 \(step 2\)"):
        ctl.fit(plain(), batches, training=ctl.Training(epochs=1))


def test_the_last_good_checkpoint_goes_on(plain, data, same, tmp_path):
    """Resumed from it, the run is the one that never diverged."""
    training = ctl.Training(epochs=3, batch_size=16, lr=0.01)
    whole = plain()
    ctl.fit(whole, data, training=training, seed=3)
    with pytest.raises(ctl.TrainingDivergedError):
        ctl.fit(plain(), data, training=training, seed=3, loss=spoiling(6), out=tmp_path)
    resumed = plain()
    ctl.fit(resumed, data, training=training, seed=3, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_weights_that_are_not_finite_are_never_saved(plain, data, tmp_path):
    """An infinite gradient in the last step of an epoch: every loss was finite, the weights are not."""

    def loss(outputs, batch):
        found = F.cross_entropy(outputs, batch[1])
        if len(batch[1]) == 2 and torch.is_grad_enabled():  # the last batch
            found.register_hook(lambda gradient: gradient * torch.nan)
        return found

    with pytest.raises(ctl.TrainingDivergedError, match=r"'stem\.0\.weight' is not finite after step 4"):
        ctl.fit(plain(), data, training=ctl.Training(epochs=3, batch_size=16), loss=loss, out=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


class Distance(Penalty):
    """The distance to the source: its gradient is 0 / 0 there."""

    kind: Literal["divergence_distance"] = "divergence_distance"

    def describe(self):
        return "the distance to the source"

    def value(self, moving):
        return sum((item.parameter - item.anchor).square().sum() for item in moving).sqrt()


class KeepsNear(ctl.Strategy):
    kind: Literal["divergence_keeps_near"] = "divergence_keeps_near"

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows if row.origin == "source")
        return plan.with_penalty(Distance(by=self.label, names=names))


del ctl.Strategy.named["divergence_keeps_near"]  # other tests list the kinds


@pytest.mark.parametrize("batch_size", [16, 64])
def test_a_penalty_without_a_gradient_at_the_source_is_suspected(plain, data, batch_size):
    """Its first step spoils the weights; with further batches the next loss would be blamed."""
    message = r"'stem\.0\.weight' is not finite after step 1\. .*, or check the gradient of a penalty of your own"
    with pytest.raises(ctl.TrainingDivergedError, match=message):
        ctl.fit(plain(KeepsNear()), data, training=ctl.Training(epochs=2, batch_size=batch_size))


def test_no_gradients_are_left_behind(plain, data):
    adaptation = plain()
    with pytest.raises(ctl.TrainingDivergedError):
        ctl.fit(adaptation, data, training=ctl.Training(batch_size=16, accumulate=2), loss=spoiling(2))
    assert all(parameter.grad is None for parameter in adaptation.model.parameters())
