"""After the last epoch: evaluation of the path, and the point of it that is kept."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

import conservtl as ctl
from conservtl.plan.decision import After

SETTINGS = {"device": "cpu", "epochs": 2, "lr": 0.05, "batch_size": 16}
TENTHS = [number / 10 for number in range(11)]


class Half(After):
    """An ``after`` decision of a user's own."""

    kind: Literal["half"] = "half"

    def describe(self):
        return "half of the head"

    def finish(self, ending):
        ending.model.head.weight.mul_(0.5)
        return {}


class Halved(ctl.Strategy):
    kind: Literal["halved"] = "halved"

    def apply(self, plan):
        return plan.with_after(Half(by=self.label))


class Scripted:
    """Metrics that return given values, and record the weights at each evaluation."""

    def __init__(self, model, values, metric="accuracy"):
        self.model, self.values, self.metric, self.shown = model, list(values), metric, []

    def holdout(self, count=1):
        data = (torch.zeros(count, 3, 12), torch.zeros(count, dtype=torch.long))
        return ctl.Holdout(data, metrics=self)

    def __call__(self, outputs, batch):
        self.shown.append(self.model.head.weight.detach().clone())
        return {self.metric: self.values[min(len(self.shown), len(self.values)) - 1]}


def along(start, end, t):
    return start + t * (end - start)


def test_the_path_is_shown_and_changes_nothing(plain, data, same):
    quiet, shown = plain(), plain()
    first = ctl.fit(quiet, data, training=ctl.Training(**SETTINGS), seed=0)
    second = ctl.fit(shown, data, training=ctl.Training(**SETTINGS), path={"target": data, "source": data}, seed=0)
    assert same(quiet.model, shown.model)
    assert first.path == ()
    assert [entry["t"] for entry in second.path] == TENTHS
    assert [entry["kept"] for entry in second.path] == [False] * 10 + [True]
    assert all(entry["target"] == entry["source"] for entry in second.path)


def test_each_point_is_that_of_its_weights(plain, data):
    adaptation = plain()
    target = Scripted(adaptation.model, [0.5])
    ctl.fit(adaptation, data, training=ctl.Training(**SETTINGS), path={"target": target.holdout()})
    start, end = adaptation.start["head.weight"], adaptation.model.head.weight
    assert len(target.shown) == 11
    for t, weight in zip(TENTHS, target.shown, strict=True):
        assert torch.allclose(weight, along(start, end, t), atol=1e-6)
    assert torch.equal(target.shown[0], start)
    assert torch.equal(target.shown[-1], end)


def test_the_kept_point_is_marked_where_it_is(plain, data):
    """A kept point between the tenths is added; its metrics are those of the final model."""
    adaptation = plain(ctl.WeightInterpolation(t=0.85, batch_norm="recompute"))
    result = ctl.fit(adaptation, data, training=ctl.Training(**SETTINGS), path={"target": data})
    assert [entry["t"] for entry in result.path] == [*TENTHS[:9], 0.85, 0.9, 1.0]
    (kept,) = (entry for entry in result.path if entry["kept"])
    device = torch.device("cpu")
    functions = ctl.engine.Functions(ctl.engine.forward, ctl.engine.cross_entropy, ctl.engine.accuracy)
    assert kept == {"t": 0.85, "kept": True, "target": ctl.engine.evaluate(adaptation.model, data, functions, device)}


def test_what_leaves_the_line_is_marked_nowhere(plain, data):
    result = ctl.fit(plain(Halved()), data, training=ctl.Training(**SETTINGS), path={"target": data})
    assert not any(entry["kept"] for entry in result.path)


class TestKeepPath:
    def test_the_best_point_is_kept(self, plain, data, same):
        """Two evaluations while training, then eleven."""
        adaptation, trained = plain(), plain()
        ctl.fit(trained, data, training=ctl.Training(**SETTINGS), seed=0)
        scores = [0.1, 0.1, 0.1, 0.2, 0.3, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
        target = Scripted(adaptation.model, scores)
        result = ctl.fit(
            adaptation, data, {"target": target.holdout(100)}, ctl.Training(**SETTINGS, keep="path"), seed=0
        )
        start, end = adaptation.start["head.weight"], trained.model.head.weight
        assert torch.allclose(adaptation.model.head.weight, along(start, end, 0.3), atol=1e-6)
        assert result.after["path"]["t"] == 0.3
        assert result.best == pytest.approx(0.9)
        points = result.after["path"]["points"]
        assert [point["t"] for point in points] == TENTHS
        assert [point["target"]["accuracy"] for point in points] == pytest.approx(scores[2:])

    def test_by_the_harmonic_mean_where_there_is_a_source(self, plain, data):
        adaptation = plain()
        target = Scripted(adaptation.model, [0.5] * 2 + [number / 10 for number in range(11)])
        source = Scripted(adaptation.model, [0.5] * 2 + [1 - number / 10 for number in range(11)])
        valid = {"target": target.holdout(100), "source": source.holdout()}
        result = ctl.fit(adaptation, data, valid, ctl.Training(**SETTINGS, keep="path"))
        assert result.after["path"]["t"] == 0.5
        assert result.best == pytest.approx(0.5)

    def test_half_an_example_is_chance(self, plain, data):
        """With ten examples differences below 0.05 are chance: the middle of the equal points is taken."""
        scores = [0.5] * 2 + [0.1, 0.1, 0.9, 0.88, 0.87, 0.86, 0.86, 0.1, 0.1, 0.1, 0.1]
        for count, expected in ((10, 0.4), (250, 0.2)):
            adaptation = plain()
            valid = {"target": Scripted(adaptation.model, scores).holdout(count)}
            result = ctl.fit(adaptation, data, valid, ctl.Training(**SETTINGS, keep="path"))
            assert result.after["path"]["t"] == expected

    def test_of_a_loss_nothing_is_chance(self, plain, data):
        adaptation = plain()
        settings = ctl.Training(**SETTINGS, keep="path", select="loss")
        valid = {"target": ctl.Holdout(data, metrics=lambda outputs, batch: {})}
        points = ctl.fit(adaptation, data, valid, settings).after["path"]["points"]
        best = min(points, key=lambda point: point["target"]["loss"])
        again = plain()
        assert ctl.fit(again, data, valid, settings).after["path"]["t"] == best["t"]

    def test_batches_from_an_iterable_are_counted(self, plain, data):
        adaptation = plain()
        scores = [0.5] * 2 + [0.1, 0.1, 0.9, 0.88, 0.87, 0.86, 0.86, 0.1, 0.1, 0.1, 0.1]
        target = Scripted(adaptation.model, [value for value in scores for _ in range(2)])
        batches = [(torch.zeros(5, 3, 12), torch.zeros(5, dtype=torch.long))] * 2
        valid = {"target": ctl.Holdout(batches, metrics=target)}
        result = ctl.fit(adaptation, data, valid, ctl.Training(**SETTINGS, keep="path"))
        assert result.after["path"]["t"] == 0.4

    def test_with_patience_the_path_ends_where_training_stopped(self, plain, data):
        adaptation, stopped = plain(), plain()
        ctl.fit(stopped, data, training=ctl.Training(**{**SETTINGS, "epochs": 3}), seed=0)
        target = Scripted(adaptation.model, [0.9, 0.5, 0.4, *[0.0] * 10, 1.0])
        settings = ctl.Training(**{**SETTINGS, "epochs": 9}, keep="path", patience=2)
        result = ctl.fit(adaptation, data, {"target": target.holdout(100)}, settings, seed=0)
        assert len(result.history) == 3
        assert result.after["path"]["t"] == 1.0
        assert torch.equal(adaptation.model.head.weight, stopped.model.head.weight)

    def test_what_is_only_shown_is_never_chosen_on(self, plain, data):
        adaptation = plain()
        target = Scripted(adaptation.model, [0.5] * 2 + [0.1, 0.9, *[0.1] * 9])
        shown = Scripted(adaptation.model, [*[0.0] * 10, 1.0])
        result = ctl.fit(
            adaptation,
            data,
            {"target": target.holdout(100)},
            ctl.Training(**SETTINGS, keep="path"),
            path={"target": shown.holdout()},
        )
        assert result.after["path"]["t"] == 0.1
        assert [entry["t"] for entry in result.path if entry["kept"]] == [0.1]

    def test_it_needs_a_validation_part(self, plain, data):
        with pytest.raises(ctl.SpecError, match=r"keep=path.*valid has no 'target'"):
            ctl.fit(plain(), data, training=ctl.Training(device="cpu", keep="path"))

    @pytest.mark.parametrize("t", [0.5, None])
    def test_it_does_not_go_with_a_strategy_that_interpolates(self, plain, data, t):
        with pytest.raises(ctl.SpecError, match="keep=path and WeightInterpolation both interpolate"):
            ctl.fit(
                plain(ctl.WeightInterpolation(t=t)), data, {"target": data}, ctl.Training(device="cpu", keep="path")
            )


def test_sets_must_be_named(plain, data):
    with pytest.raises(ctl.SpecError, match="path must name its sets"):
        ctl.fit(plain(), data, path=data)
