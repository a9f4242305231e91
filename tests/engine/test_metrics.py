"""What decides if there are no classes; metrics pooled over a set; validation losses that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.engine.evaluation import Functions, evaluate
from conservtl.functions import accuracy, cross_entropy, forward

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def linear(outputs):
    torch.manual_seed(0)
    return ctl.adapt(nn.Linear(4, outputs), nn.Linear(4, outputs), [ctl.L2SP()])


class TestDefaultAccuracy:
    def test_class_indices(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        assert accuracy(logits, (None, torch.tensor([0, 1, 1])))["accuracy"] == pytest.approx(2 / 3)
        right, counted = accuracy(logits, (None, torch.tensor([0, -100, 1])))["accuracy"]
        assert (right, counted) == (1, 2)

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [
            (torch.zeros(3, 1), torch.tensor([0, 1, 1])),
            (torch.zeros(3), torch.tensor([0, 1, 1])),
            (torch.zeros(3, 2), torch.zeros(3)),
            (torch.zeros(3, 2), torch.zeros(3, 2)),
            (torch.zeros(3, 2), torch.zeros(3, 2).long()),
            (torch.zeros(3, 5, 2), torch.zeros(3, 5).long()),
            (torch.zeros(3, 2, 4, 4), torch.zeros(3, 4, 4).long()),
            (torch.zeros(3, 2), torch.zeros(4).long()),
            ({"boxes": torch.zeros(3, 4)}, torch.zeros(3).long()),
            (torch.zeros(3, 2), None),
        ],
    )
    def test_nothing_else_has_one(self, logits, labels):
        assert accuracy(logits, (None, labels)) == {}

    def test_a_batch_without_labels_has_none(self):
        assert accuracy(torch.zeros(3, 2), {"inputs": X}) == {}
        assert accuracy(torch.zeros(3, 2), (X,)) == {}


TASKS = {
    "one number": (1, torch.randn(6, 1), F.mse_loss),
    "several numbers": (3, torch.randn(6, 3), F.l1_loss),
    "one label": (1, torch.ones(6, 1), F.binary_cross_entropy_with_logits),
    "several labels": (3, torch.ones(6, 3), F.binary_cross_entropy_with_logits),
    "shares": (3, torch.full((6, 3), 1 / 3), F.cross_entropy),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("settings", [{}, {"keep": "target"}, {"keep": "harmonic"}, {"keep": "path"}, {"patience": 2}])
def test_without_classes_the_loss_decides(task, settings):
    outputs, labels, loss = TASKS[task]
    adaptation, data = linear(outputs), (X, labels)
    training = ctl.Training(epochs=4, batch_size=3, lr=0.1, device="cpu", **settings)
    result = ctl.fit(
        adaptation, data, {"target": data, "source": data}, training, loss=lambda o, b: loss(o, b[1]), watch={"a": data}
    )
    losses = [line["target"]["loss"] for line in result.history]
    assert set(result.history[0]["target"]) == {"loss"}
    if settings.get("keep") == "target":
        assert result.best == pytest.approx(-min(losses))
        assert loss(adaptation.model(X), labels).item() == pytest.approx(min(losses), rel=1e-5)


def test_the_weights_of_the_least_loss_are_kept():
    """By hand: a rate far too high, so that the first epoch is the best."""
    adaptation, data = linear(1), (X, X @ torch.ones(4, 1))
    training = ctl.Training(epochs=3, batch_size=6, optimizer="sgd", lr=5.0, keep="target", device="cpu")
    result = ctl.fit(adaptation, data, {"target": data}, training, loss=lambda o, b: F.mse_loss(o, b[1]))
    losses = [line["target"]["loss"] for line in result.history]
    assert losses[0] < losses[1] < losses[2]
    assert F.mse_loss(adaptation.model(X), data[1]).item() == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", ["SurgicalFineTuning", "WeightInterpolation"])
def test_choices_by_the_loss(name):
    torch.manual_seed(0)
    model, source = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2))
    chosen = ctl.SurgicalFineTuning(block="best") if name == "SurgicalFineTuning" else ctl.WeightInterpolation()
    adaptation, data = ctl.adapt(model, source, [chosen]), (X, X @ torch.ones(4, 1))
    training = ctl.Training(epochs=2, lr=0.1, device="cpu")
    result = ctl.fit(adaptation, data, {"target": data}, training, loss=lambda o, b: F.mse_loss(o, b[1]))
    assert result.best is not None
    assert result.best < 0


class TestPositions:
    """The default loss of logits with positions."""

    LABELS = torch.tensor([[0, 1, 2, 1], [2, -100, 0, -100]])

    def expected(self, logits, labels):
        values = [
            -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
            for rows, column in zip(logits.tolist(), labels.tolist(), strict=True)
            for row, label in zip(rows, column, strict=True)
            if label != -100
        ]
        return sum(values) / len(values)

    def test_frames_and_maps(self):
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        expected = pytest.approx(self.expected(logits, self.LABELS), rel=1e-5)
        assert cross_entropy(logits, (None, self.LABELS)).item() == expected
        assert cross_entropy(logits.transpose(1, 2), (None, self.LABELS)).item() == expected
        maps = logits.transpose(1, 2).unflatten(2, (2, 2))
        assert cross_entropy(maps, (None, self.LABELS.view(2, 2, 2))).item() == expected

    def test_as_many_frames_as_classes(self):
        """Torch's layout, but the other for outputs of Hugging Face models."""

        class Outputs:
            logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))

        labels = self.LABELS[:, :3]
        last = cross_entropy(Outputs(), (None, labels)).item()
        assert last == pytest.approx(self.expected(Outputs.logits, labels), rel=1e-5)
        torch.testing.assert_close(
            cross_entropy(Outputs.logits, (None, labels)), F.cross_entropy(Outputs.logits, labels)
        )

    def test_nothing_that_counts_costs_nothing(self):
        assert cross_entropy(torch.randn(2, 4, 3), (None, torch.full((2, 4), -100))) == 0

    def test_lengths_in_the_batch(self):
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 0]])
        batch = {"inputs": torch.zeros(2, 4, 5), "lengths": torch.tensor([4, 2]), "labels": labels}
        ignored = labels.clone()
        ignored[1, 2:] = -100
        assert cross_entropy(logits, batch).item() == pytest.approx(self.expected(logits, ignored), rel=1e-5)


def test_sums_and_counts_are_pooled():
    """An error rate over a set is all errors over all words, whatever the batches."""
    errors, words = torch.tensor([0.0, 3, 1, 0, 2, 5]), torch.tensor([1.0, 9, 2, 4, 4, 10])
    data = X, torch.stack([errors, words], 1)

    def metrics(_, batch):
        return {"wer": (batch[1][:, 0].sum(), batch[1][:, 1].sum())}

    functions = Functions(forward, lambda o, _: o.mean(), metrics)
    rates = [evaluate(nn.Linear(4, 2), data, functions, CPU, size)["wer"] for size in (1, 4, 6)]
    assert rates == pytest.approx([11 / 30] * 3)


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_loss_of_classes_is_the_mean_over_all_positions_that_count(loss):
    """Whatever the batches: the second of these has one label."""
    generator = torch.Generator().manual_seed(0)
    maps, labels = torch.randn(3, 4, 2, 5, generator=generator), torch.randint(4, (3, 2, 5), generator=generator)
    labels[1] = labels[2] = -100
    labels[2, 0, 0] = 3
    functions = Functions(forward, loss, lambda *_: {})
    smoothing = getattr(loss, "label_smoothing", 0.0)
    expected = F.cross_entropy(maps, labels, label_smoothing=smoothing).item()
    for size in (2, 3):
        assert evaluate(nn.Identity(), (maps, labels), functions, CPU, size)["loss"] == pytest.approx(expected)


class TestLossesThatAreNoNumbers:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("settings", [{"keep": "target"}, {"patience": 1}, {}])
    def test_a_validation_loss_stops_the_run_and_names_the_batch(self, value, settings):
        labels = torch.randn(6, 1)
        spoiled = labels.clone()
        spoiled[4] = value
        training = ctl.Training(epochs=2, evaluate_batch_size=2, device="cpu", **settings)
        message = rf"validation set 'target' is {value} at its batch 3 of 3 \(examples 4, 5\)"
        with pytest.raises(ctl.TrainingDivergedError, match=message):
            ctl.fit(linear(1), (X, labels), {"target": (X, spoiled)}, training, loss=lambda o, b: F.mse_loss(o, b[1]))

    def test_streamed_batches_are_named_by_number(self):
        batches = [(X, torch.randn(6, 1)), (X, torch.full((6, 1), math.nan))]
        with pytest.raises(
            ctl.TrainingDivergedError,
            match=r"'target' is nan at its batch 2 of 2, because batch\[1\] in ex",
        ):
            ctl.fit(
                linear(1), [batches[0]], {"target": batches}, ctl.Training(epochs=1, device="cpu"),
                loss=lambda o, b: F.mse_loss(o, b[1]),
            )  # fmt: skip

    def test_what_is_only_watched_stops_nothing(self):
        data = X, torch.full((6, 1), math.nan)
        result = ctl.fit(
            linear(1), (X, torch.randn(6, 1)), watch={"target": data}, training=ctl.Training(epochs=1, device="cpu"),
            loss=lambda o, b: F.mse_loss(o, b[1]),
        )  # fmt: skip
        assert math.isnan(result.history[0]["target"]["loss"])


@pytest.mark.parametrize(("size", "most"), [(2, 2), (4, 4), (256, 6)])
def test_evaluations_have_batches_of_their_own_size(size, most):
    seen = []

    def counted(model, batch):
        if not torch.is_grad_enabled():
            seen.append(len(batch[0]))
        return model(batch[0])

    data = X, torch.zeros(6).long()
    training = ctl.Training(epochs=1, batch_size=3, evaluate_batch_size=size, device="cpu")
    ctl.fit(linear(2), data, {"target": data}, training, forward=counted)
    assert max(seen) == most
    assert sum(seen) == 6
