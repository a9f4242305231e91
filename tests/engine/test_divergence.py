"""A run that diverges stops, names the place and leaves the last good checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.engine.batch import Batch
from conservtl.engine.divergence import Losses, check_scale, finite_rows, where_not_finite
from conservtl.engine.held import Held
from conservtl.engine.snapshot import State
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


NAN, INF = float("nan"), float("inf")


class TestInputs:
    """An input that is not finite is named: its part of the batch, its example, its name where one is known."""

    def said(self, adaptation, data, match, **options):
        training = ctl.Training(epochs=2, batch_size=4, device="cpu", **options.pop("settings", {}))
        with pytest.raises(ctl.TrainingDivergedError, match=match) as raised:
            ctl.fit(adaptation, data, options.pop("valid", None), training, **options)
        return str(raised.value)

    def test_an_example_with_its_name(self, plain, data):
        inputs = data[0][:16].clone()
        inputs[11, 2, 3] = NAN
        named = ctl.data.Examples(inputs, data[1][:16], [f"{number}.wav" for number in range(16)])
        said = self.said(plain(), named, r"the loss is nan at batch \d of epoch 1 ")
        assert "because batch[0] in example 11 (11.wav) is not finite" in said
        assert "lower training.lr" not in said

    def test_targets(self, data):
        """One infinite number of a target; the inputs are fine."""
        inputs, targets = data[0][:8].flatten(1), torch.zeros(8, 4)
        targets[5, 1] = INF
        adaptation = ctl.adapt(torch.nn.Linear(36, 4), torch.nn.Linear(36, 4), [])
        said = self.said(adaptation, (inputs, targets), "loss is inf", loss=torch.nn.MSELoss())
        assert "because batch[1] in example 5 is not finite" in said

    def test_both_inputs_of_a_dictionary(self, plain, data):
        content = {"mean": torch.zeros(8), "inputs": data[0][:8].clone(), "labels": data[1][:8]}
        content["inputs"][0], content["inputs"][3], content["mean"][3] = NAN, INF, NAN
        said = self.said(
            plain(),
            [content],
            "loss is nan",
            forward=lambda model, batch: model(batch["inputs"]),
            loss=lambda outputs, batch: F.cross_entropy(outputs, batch["labels"]),
        )
        assert "because batch['mean'] in example 3 and batch['inputs'] in examples 0, 3 is not finite" in said

    def test_names_that_a_batch_brings(self, plain, data):
        content = {"inputs": data[0][:2].clone(), "labels": data[1][:2], "names": ["a.wav", "b.wav"]}
        content["inputs"][1] = NAN
        forward, loss = (lambda model, batch: model(batch["inputs"])), spoiling_by_labels
        assert "in example 1 (b.wav)" in self.said(plain(), [content], "is nan", forward=forward, loss=loss)

    def test_what_an_augmentation_made(self, plain, data):
        def augment(batch, generator):
            return batch[0] / 0.0, batch[1]

        assert "because batch[0] in examples" in self.said(plain(), (data[0][:4], data[1][:4]), "nan", augment=augment)

    def test_a_validation_set(self, plain, data):
        inputs = data[0][:8].clone()
        inputs[6] = NAN
        wrong = {"target": (inputs, data[1][:8])}
        streamed = {"target": [(inputs[:4], data[1][:4]), (inputs[4:], data[1][4:8])]}
        for valid, place in ((wrong, 6), (streamed, 2)):
            said = self.said(plain(), data, "validation set 'target'", valid=valid, settings={"keep": "target"})
            assert f"because batch[0] in example {place} is not finite. Mend that input" in said

    @pytest.mark.parametrize("streamed", [False, True])
    def test_losses_that_are_read_later(self, data, streamed):
        """As on a GPU: the batch is gone, and is read again, or was looked at before."""
        inputs = data[0][:8].clone()
        inputs[5] = NAN
        held = Held((inputs, data[1][:8]), 4, torch.device("cpu"))
        losses = Losses(State(), torch.device("cuda"), held)
        index = None if streamed else torch.arange(4, 8)
        for number, value in ((1, 1.0), (2, NAN)):
            rows = slice(4 * number - 4, 4 * number)
            place = torch.arange(8)[rows] if index is not None else None
            losses.add(torch.tensor(value), Batch((inputs[rows], data[1][rows]), 4, place), number, number)
        with pytest.raises(ctl.TrainingDivergedError, match=rf"batch\[0\] in example {1 if streamed else 5} is not"):
            losses.look()

    def test_finite_inputs_are_not_read_from_the_device(self, data):
        rows = finite_rows((data[0], data[1], torch.tensor(1.0), ["names"]))
        assert {part: tuple(one.shape) for part, one in rows.items()} == {"batch[0]": (50,), "batch[2]": ()}
        assert where_not_finite(rows) is None


def spoiling_by_labels(outputs, batch):
    return F.cross_entropy(outputs, batch["labels"])


def test_a_weight_that_a_step_spoiled_is_named_and_not_the_next_batch(plain, data):
    """An infinite gradient at the 2nd step, whose loss is finite: the 3rd batch is not to blame."""
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        found = F.cross_entropy(outputs, batch[1])
        if calls == 2:
            found.register_hook(lambda gradient: gradient * torch.inf)
        return found

    with pytest.raises(ctl.TrainingDivergedError, match=r"'stem\.0\.weight' is not finite after step 2\."):
        ctl.fit(plain(), data, training=ctl.Training(epochs=1, batch_size=16, device="cpu"), loss=loss)


def test_a_weight_that_is_not_finite_from_the_beginning_is_named(plain, data):
    adaptation = plain()
    with torch.no_grad():
        adaptation.model.head.bias[0] = torch.nan
    with pytest.raises(ctl.TrainingDivergedError, match=r"'head\.bias' is not finite before the first step"):
        ctl.fit(adaptation, data, training=ctl.Training(epochs=1, device="cpu"))


def test_a_gradient_to_clip_is_named(plain, data):
    """The square root of zero: the loss is finite, its slope at the head's bias is not."""
    adaptation = plain()

    def loss(outputs, batch):
        head = adaptation.model.head.bias
        return F.cross_entropy(outputs, batch[1]) + (head - head.detach()).abs().sum().sqrt()

    with pytest.raises(ctl.TrainingDivergedError, match=r"gradient of 'head\.bias' is not finite at step 1"):
        ctl.fit(adaptation, data, training=ctl.Training(epochs=1, clip=1.0, device="cpu"), loss=loss)


@pytest.mark.parametrize(("skips", "stops"), [(1, False), (20, False), (27, True)])
def test_overflows_of_fp16_are_not_counted_until_no_scale_is_left(skips, stops):
    """Torch's scaler begins at 2^16 and halves with each step that it skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    for _ in range(skips):
        scaler.scale(parameter * torch.inf).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    with pytest.raises(ctl.TrainingDivergedError, match="fp16 skips each step") if stops else nullcontext():
        check_scale(scaler, skips)
