"""Which weights are kept, and when training stops early."""

from __future__ import annotations

import math

import pytest
import torch

import conservtl as ctl
from conservtl.engine import harmonic_mean
from conservtl.engine.selection import Selection, score

ONE = (torch.zeros(1, 3, 12), torch.zeros(1, dtype=torch.long))


class Scripted:
    """Validation that finds what it is told, one value a look, and notes the weights it was shown."""

    def __init__(self, model, values, metric="accuracy"):
        self.model, self.values, self.metric, self.shown = model, list(values), metric, []

    def holdout(self):
        return ctl.Holdout(ONE, metrics=self)

    def __call__(self, outputs, batch):
        self.shown.append(self.model.head.weight.detach().clone())
        return {self.metric: self.values[len(self.shown) - 1]}


def test_the_last_weights_are_kept_by_default(plain, data):
    adaptation = plain()
    target = Scripted(adaptation.model, [0.9, 0.5, 0.1])
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, ctl.Training(epochs=3, lr=0.1))
    assert torch.equal(adaptation.model.head.weight, target.shown[2])
    assert result.best == pytest.approx(0.9)


def test_the_best_on_the_target_are_kept(plain, data):
    """Whatever the source says."""
    adaptation = plain()
    target = Scripted(adaptation.model, [0.1, 0.9, 0.8, 0.2])
    source = Scripted(adaptation.model, [0.9, 0.0, 0.5, 0.5])
    valid = {"target": target.holdout(), "source": source.holdout()}
    result = ctl.fit(adaptation, data, valid, ctl.Training(epochs=4, lr=0.1, keep="target"))
    assert torch.equal(adaptation.model.head.weight, target.shown[1])
    assert result.best == pytest.approx(0.9)
    assert not torch.equal(target.shown[1], target.shown[2])


@pytest.mark.parametrize(("losses", "kept"), [((3, 2, 1, 0), 2), ((3, 1, 2, 0), 1), ((3, 1, 1, 0), 1)])
def test_of_equal_accuracies_the_lower_loss_is_kept(plain, data, losses, kept):
    """Ten examples have eleven accuracies: the first to reach the best is seldom the best. The first of true equals."""
    adaptation = plain()
    target, left = Scripted(adaptation.model, [0.1, 0.9, 0.9, 0.2]), iter(losses)
    holdout = ctl.Holdout(ONE, metrics=target, loss=lambda *_: torch.tensor(float(next(left))))
    training = ctl.Training(epochs=9, lr=0.1, keep="target", patience=2)
    result = ctl.fit(adaptation, data, {"target": holdout}, training)
    assert torch.equal(adaptation.model.head.weight, target.shown[kept])
    assert len(result.history) == 4, "patience waits for accuracy"


def test_the_best_harmonic_mean_is_kept(plain, data):
    """A target won by losing the source is worth less than both held."""
    adaptation = plain()
    target = Scripted(adaptation.model, [0.5, 1.0, 0.8])
    source = Scripted(adaptation.model, [0.9, 0.1, 0.8])
    valid = {"target": target.holdout(), "source": source.holdout()}
    result = ctl.fit(adaptation, data, valid, ctl.Training(epochs=3, lr=0.1, keep="harmonic"))
    assert torch.equal(adaptation.model.head.weight, target.shown[2])
    assert result.best == pytest.approx(0.8)


def test_what_is_only_watched_is_never_selected_on(plain, data):
    adaptation = plain()
    target = Scripted(adaptation.model, [0.1, 0.9, 0.5])
    test = Scripted(adaptation.model, [1.0, 0.0, 0.0])
    training = ctl.Training(epochs=3, lr=0.1, keep="target")
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, training, watch={"target": test.holdout()})
    assert torch.equal(adaptation.model.head.weight, target.shown[1])
    assert [line["target"]["accuracy"] for line in result.history] == [1.0, 0.0, 0.0]
    assert [line["valid"]["target"]["accuracy"] for line in result.history] == pytest.approx([0.1, 0.9, 0.5])


def test_patience_stops_training(plain, data):
    """Two looks without a better score end it; the best is kept."""
    adaptation = plain()
    target = Scripted(adaptation.model, [0.5, 0.6, 0.5, 0.1, 0.9])
    training = ctl.Training(epochs=9, lr=0.1, keep="target", patience=2)
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, training)
    assert len(result.history) == 4
    assert torch.equal(adaptation.model.head.weight, target.shown[1])


def test_patience_counts_evaluations(plain, data):
    adaptation = plain()
    target = Scripted(adaptation.model, [0.5, 0.4, 0.3])
    training = ctl.Training(epochs=9, patience=1, evaluate_every=2)
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, training)
    assert [line["epoch"] for line in result.history if "target" in line] == [2, 4]
    assert len(result.history) == 4


def test_patience_does_not_cut_a_phase_short(plain, data):
    """Only the last phase can end early: the layers that it would unfreeze are the point of it."""
    adaptation = plain(ctl.GradualUnfreezing(epochs=3))
    target = Scripted(adaptation.model, [0.9, 0.1, 0.1, 0.1, 0.1])
    training = ctl.Training(epochs=9, patience=2)
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, training)
    assert len(result.history) == 5


def test_the_last_epoch_is_always_evaluated(plain, data):
    result = ctl.fit(plain(), data, {"target": data}, ctl.Training(epochs=3, evaluate_every=2))
    assert [line["epoch"] for line in result.history if "target" in line] == [2, 3]


def test_without_accuracies_the_loss_is_selected_on():
    found = {"target": {"loss": 2.0, "wer": 0.5}, "source": {"loss": 1.0}}
    assert score(found, "harmonic") == -3
    assert score(found, "target") == -2


def test_a_score_that_is_no_number_is_never_the_best(net):
    """NaN compares false with everything, and must not stand in the way of what comes after."""
    selection, model = Selection(), net()
    for loss in (math.nan, 2.0, math.nan):
        selection.look({"target": {"loss": loss}}, model, ctl.Training(keep="target"))
    assert (selection.best, selection.stale) == (-2.0, 1)


def test_harmonic_mean():
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0


@pytest.mark.parametrize("settings", [{"keep": "target"}, {"keep": "harmonic"}, {"patience": 1}])
def test_selection_needs_a_validation_part(plain, data, settings):
    with pytest.raises(ctl.SpecError, match="valid has no 'target'"):
        ctl.fit(plain(), data, training=ctl.Training(**settings))


def test_harmonic_needs_a_source(plain, data):
    with pytest.raises(ctl.SpecError, match="valid has no 'source'"):
        ctl.fit(plain(), data, {"target": data}, ctl.Training(keep="harmonic"))
