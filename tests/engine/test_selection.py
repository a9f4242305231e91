"""Selection of the weights to keep, and early stopping."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

import conservtl as ctl
from conservtl.engine import Criterion, harmonic_mean, score
from conservtl.engine.kept_weights import Selection

ONE = (torch.zeros(1, 3, 12), torch.zeros(1, dtype=torch.long))


class Scripted:
    """Metrics that return given values, one per evaluation, and record the weights."""

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
    """Whatever the score on the source."""
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
    """Ten examples have eleven accuracies: the loss decides between equal ones, and the order between equal losses."""
    adaptation = plain()
    target, left = Scripted(adaptation.model, [0.1, 0.9, 0.9, 0.2]), iter(losses)
    holdout = ctl.Holdout(ONE, metrics=target, loss=lambda *_: torch.tensor(float(next(left))))
    training = ctl.Training(epochs=9, lr=0.1, keep="target", patience=2)
    result = ctl.fit(adaptation, data, {"target": holdout}, training)
    assert torch.equal(adaptation.model.head.weight, target.shown[kept])
    assert len(result.history) == 4, "patience waits for accuracy"


def test_the_best_harmonic_mean_is_kept(plain, data):
    """A good target score with a bad source score is worth less than two fair ones."""
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
    """Two evaluations without a better score end training; the best weights are kept."""
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
    """Only the last phase can end early: earlier phases exist to unfreeze layers."""
    adaptation = plain(ctl.GradualUnfreezing(epochs=3))
    target = Scripted(adaptation.model, [0.9, 0.1, 0.1, 0.1, 0.1])
    training = ctl.Training(epochs=9, patience=2)
    result = ctl.fit(adaptation, data, {"target": target.holdout()}, training)
    assert len(result.history) == 5


def test_the_last_epoch_is_always_evaluated(plain, data):
    result = ctl.fit(plain(), data, {"target": data}, ctl.Training(epochs=3, evaluate_every=2))
    assert [line["epoch"] for line in result.history if "target" in line] == [2, 3]


def test_the_loss_is_selected_on_if_asked_for():
    found = {"target": {"loss": 2.0, "wer": 0.5}, "source": {"loss": 1.0}}
    assert score(found, "harmonic", ctl.Training(select="loss").select) == -3
    assert score(found, "target", ctl.Training(select="loss").select) == -2


F1 = {"metric": "f1", "direction": "higher"}


class TestSelect:
    """``training.select`` names the metric of every decision."""

    @pytest.mark.parametrize(
        ("select", "expected"),
        [
            ("accuracy", {"metric": "accuracy", "direction": "higher"}),
            ("wer", {"metric": "wer", "direction": "lower"}),
            ({"metric": "cer"}, {"metric": "cer", "direction": "lower"}),
            (F1, F1),
            ({"metric": "perplexity", "direction": "lower"}, {"metric": "perplexity", "direction": "lower"}),
        ],
    )
    def test_a_known_metric_has_a_direction(self, select, expected):
        training = ctl.Training(select=select)
        assert training.select.model_dump() == expected
        assert ctl.Training(**training.model_dump(mode="json")) == training

    @pytest.mark.parametrize("select", ["acuracy", "f1", {"metric": "f1"}])
    def test_another_metric_needs_one(self, select):
        with pytest.raises(ValidationError, match=r"the direction of '(acuracy|f1)' is not known; known are accuracy"):
            ctl.Training(select=select)

    def test_a_misspelt_metric_is_recognised(self):
        with pytest.raises(ValidationError, match=r"Did you mean 'accuracy'\?"):
            ctl.Training(select="acuracy")

    def test_a_known_direction_is_not_turned_round(self):
        with pytest.raises(ValidationError, match="loss is better when it is lower; received direction 'higher'"):
            ctl.Training(select={"metric": "loss", "direction": "higher"})

    def test_of_shares_the_harmonic_mean_is_taken(self):
        found = {"target": {"loss": 1.0, "f1": 0.5}, "source": {"loss": 1.0, "f1": 1.0}}
        select = ctl.Training(select=F1).select
        assert score(found, "harmonic", select) == pytest.approx(2 / 3)
        assert score(found, "path", select) == pytest.approx(2 / 3)
        assert score(found, "target", select) == 0.5

    def test_of_a_metric_where_lower_is_better_the_sum_counts(self):
        select = ctl.Training(select="wer").select
        better = {"target": {"loss": 1.0, "wer": 0.2}, "source": {"loss": 1.0, "wer": 0.1}}
        worse = {"target": {"loss": 1.0, "wer": 0.1}, "source": {"loss": 1.0, "wer": 0.3}}
        assert score(better, "harmonic", select) == pytest.approx(-0.3)
        assert score(better, "harmonic", select) > score(worse, "harmonic", select)
        assert score(better, "target", select) < score(worse, "target", select)

    def test_a_negative_value_has_no_harmonic_mean(self):
        select = Criterion(metric="r2", direction="higher")
        found = {"target": {"loss": 1.0, "r2": 0.5}, "source": {"loss": 1.0, "r2": -0.1}}
        with pytest.raises(ctl.SpecError, match=r"'r2' of 'source' is -0.1\. Select on the target alone"):
            score(found, "harmonic", select)
        assert score({"target": {"loss": 1.0, "r2": -0.1}}, "harmonic", select) == -0.1

    @pytest.mark.parametrize(
        ("select", "kept"), [("wer", 1), ({"metric": "wer", "direction": "lower"}, 1), ({**F1, "metric": "other"}, 2)]
    )
    def test_the_best_by_that_metric_are_kept(self, plain, data, select, kept):
        """A custom metric is not replaced by the loss."""
        adaptation = plain()
        target = Scripted(adaptation.model, [0.3, 0.1, 0.4], metric="wer")
        holdout = ctl.Holdout(ONE, metrics=lambda *batch: (found := target(*batch)) | {"other": found["wer"]})
        training = ctl.Training(epochs=3, lr=0.1, keep="target", select=select)
        result = ctl.fit(adaptation, data, {"target": holdout}, training)
        assert torch.equal(adaptation.model.head.weight, target.shown[kept])
        assert result.best == pytest.approx({1: -0.1, 2: 0.4}[kept])

    def test_the_loss_is_kept_only_if_asked_for(self, plain, data):
        adaptation, losses = plain(), iter([2.0, 1.0, 3.0])
        target = Scripted(adaptation.model, [0.9, 0.5, 0.1])
        holdout = ctl.Holdout(ONE, metrics=target, loss=lambda *_: torch.tensor(next(losses)))
        training = ctl.Training(epochs=3, lr=0.1, keep="target", select="loss")
        assert ctl.fit(adaptation, data, {"target": holdout}, training).best == -1
        assert torch.equal(adaptation.model.head.weight, target.shown[1])

    @pytest.mark.parametrize("settings", [{"keep": "target"}, {"keep": "path"}, {"patience": 2}])
    def test_metrics_without_an_accuracy_are_refused_if_they_decide(self, plain, data, settings):
        adaptation = plain()
        target = Scripted(adaptation.model, [0.3, 0.1, 0.4], metric="f1")
        refusal = r"'accuracy' is not among .* 'target', which are 'loss', 'f1'\. .* training\.select='f1'"
        with pytest.raises(ctl.SpecError, match=refusal):
            ctl.fit(adaptation, data, {"target": target.holdout()}, ctl.Training(epochs=3, **settings))
        assert len(target.shown) == 1, "at the first evaluation"

    @pytest.mark.parametrize(
        "strategy", [ctl.WeightInterpolation(t=None), ctl.SurgicalFineTuning(block="best", candidates=["head*"])]
    )
    def test_and_if_a_strategy_chooses_by_them(self, plain, data, strategy):
        adaptation = plain(strategy)
        target = Scripted(adaptation.model, [0.3, 0.1, 0.4], metric="f1")
        with pytest.raises(ctl.SpecError, match=r"training\.select='f1'"):
            ctl.fit(adaptation, data, {"target": target.holdout()}, ctl.Training(epochs=3))
        assert len(target.shown) <= 1

    def test_a_strategy_chooses_by_that_metric(self, plain, data):
        """The path's point and the block with the lowest error are chosen."""
        adaptation = plain(ctl.WeightInterpolation(t=None, points=3))
        target = Scripted(adaptation.model, [0.5, 0.5, 0.4, 0.1, 0.3], metric="wer")
        result = ctl.fit(adaptation, data, {"target": target.holdout()}, ctl.Training(epochs=2, select="wer"))
        assert result.after["weight_interpolation"]["t"] == 0.5
        values = {"stem*": 0.2, "head*": 0.1}
        adaptation = plain(ctl.SurgicalFineTuning(block="best", candidates=list(values)))
        left = iter(values.values())
        holdout = ctl.Holdout(ONE, metrics=lambda *_: {"wer": next(left)})
        scores = ctl.best_block(adaptation, data, {"target": holdout}, ctl.Training(epochs=1, select="wer"))
        assert scores == pytest.approx({"stem*": -0.2, "head*": -0.1})
        assert adaptation.plan.facts == {"surgical_block": "head*"}

    def test_only_an_accuracy_has_a_margin_of_chance(self, plain, data):
        """Half of one in ten examples is 0.05 of an accuracy; for an F1 the margin is 0."""
        scores = [0.5] * 2 + [0.1, 0.1, 0.9, 0.88, 0.87, 0.86, 0.86, 0.1, 0.1, 0.1, 0.1]
        points = {}
        for metric in ("accuracy", "f1"):
            adaptation = plain()
            target = Scripted(adaptation.model, scores, metric)
            valid = {"target": ctl.Holdout((data[0][:10], data[1][:10]), metrics=target)}
            settings = ctl.Training(epochs=2, keep="path", select={"metric": metric, "direction": "higher"})
            points[metric] = ctl.fit(adaptation, data, valid, settings).after["path"]["t"]
        assert points == {"accuracy": 0.4, "f1": 0.2}

    def test_a_metric_that_the_default_metrics_do_not_have_is_refused_before_training(self, plain, data):
        calls = []

        def forward(model, batch):
            calls.append(1)
            return model(batch[0])

        with pytest.raises(ctl.SpecError, match=r"'wer' is not among .* 'loss', 'accuracy'"):
            ctl.fit(plain(), data, {"target": data}, ctl.Training(epochs=1, select="wer"), forward=forward)
        assert not calls

    def test_where_nothing_is_decided_nothing_is_asked(self, plain, data):
        adaptation = plain()
        target = Scripted(adaptation.model, [0.3, 0.1], metric="f1")
        result = ctl.fit(adaptation, data, {"target": target.holdout()}, ctl.Training(epochs=2))
        assert result.best is None
        assert [line["target"]["f1"] for line in result.history] == pytest.approx([0.3, 0.1])


def test_a_score_that_is_no_number_is_never_the_best(net):
    """NaN compares false with everything, and must not block a later score."""
    selection, model = Selection(), net()
    for loss in (math.nan, 2.0, math.nan):
        selection.look({"target": {"loss": loss}}, model, ctl.Training(keep="target", select="loss"))
    assert (selection.best, selection.stale) == (-2.0, 1)


def test_harmonic_mean():
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0


@pytest.mark.parametrize("settings", [{"keep": "target"}, {"keep": "harmonic"}, {"patience": 1}])
def test_selection_needs_a_validation_part(plain, data, settings):
    with pytest.raises(ctl.SpecError, match="valid has no 'target'"):
        ctl.fit(plain(), data, training=ctl.Training(**settings))


@pytest.mark.parametrize(
    ("settings", "strategies", "message"),
    [
        ({"keep": "target"}, [], r"^training\.keep=target chooses by a validation set, .* or leave it out\.$"),
        ({"patience": 3}, [], r"^training\.patience=3 chooses by a validation set, .* or leave it out\.$"),
        (
            {"keep": "path", "patience": 3},
            [],
            r"^training\.keep=path and training\.patience=3 choose by .* them out",
        ),
        ({}, [ctl.Projection(radius="learn", steps=2)], "^Projection chooses on a validation part"),
    ],
)
def test_only_what_is_set_is_named(plain, data, settings, strategies, message):
    with pytest.raises(ctl.SpecError, match=message):
        ctl.fit(plain(*strategies), data, training=ctl.Training(epochs=3, **settings))


def test_harmonic_needs_a_source(plain, data):
    with pytest.raises(ctl.SpecError, match="valid has no 'source'"):
        ctl.fit(plain(), data, {"target": data}, ctl.Training(keep="harmonic"))
