"""The form of output conservation: what the task's loss takes the outputs as, over the axis of their classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.output_conservation import OutputConservationTerm
from conservtl.plan.term import View


def softmax(values):
    exponents = [math.exp(value) for value in values]
    return [value / sum(exponents) for value in exponents]


def kl(source, adapted):
    """KL divergence of two lists of logits, with plain floats."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(source), softmax(adapted), strict=True))


def binary_kl(source, adapted):
    """KL divergence of two logits of one label."""
    p, q = 1 / (1 + math.exp(-source)), 1 / (1 + math.exp(-adapted))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Shifted(nn.Module):
    """Returns its input plus a bias for each class, on an axis."""

    def __init__(self, classes, axis=1):
        super().__init__()
        self.bias, self.axis = nn.Parameter(torch.zeros(classes)), axis

    def forward(self, x):
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x + self.bias.view(shape)


def term(loss, x, bias, *, axis=1, weight=1.0, **fields):
    """Value of the term if the model differs from the source by a bias, for a task's loss (outputs) -> scalar."""
    source = Shifted(len(bias), axis)
    chosen = ctl.OutputConservation(weight=weight, temperature=1.0, **fields)
    adaptation = ctl.adapt(Shifted(len(bias), axis), source, [chosen])
    with torch.no_grad():
        adaptation.model.bias.copy_(torch.tensor(bias))
    outputs = adaptation.model(x)
    task = loss(outputs)
    return (adaptation.loss(task, outputs, x) - task).item()


GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(2, 3, 2, 4, generator=GENERATOR)
PIXELS = torch.randint(3, (2, 2, 4), generator=GENERATOR)
ROWS = torch.randn(4, 3, generator=GENERATOR)
BIAS = [0.3, -0.2, 0.1]
Y = torch.tensor([0, 1, 2, 0])


class TestClasses:
    def by_pixel(self):
        pixels = [MAP[n, :, h, w].tolist() for n in range(2) for h in range(2) for w in range(4)]
        return mean(kl(pixel, [a + b for a, b in zip(pixel, BIAS, strict=True)]) for pixel in pixels)

    def test_a_map_of_classes_is_compared_pixel_by_pixel(self):
        """The softmax runs over the classes, not over the width."""
        found = term(lambda outputs: F.cross_entropy(outputs, PIXELS), MAP, BIAS)
        assert found == pytest.approx(self.by_pixel(), rel=1e-4)

    def test_a_map_with_classes_last_that_the_loss_flattens(self):
        x = MAP.permute(0, 2, 3, 1).contiguous()
        found = term(lambda outputs: F.cross_entropy(outputs.reshape(-1, 3), PIXELS.flatten()), x, BIAS, axis=-1)
        assert found == pytest.approx(self.by_pixel(), rel=1e-4)

    def test_a_ruined_map_is_far_from_the_source(self):
        assert term(lambda outputs: F.cross_entropy(outputs, PIXELS), MAP, [20.0, 0.0, -20.0]) > 1

    @pytest.mark.parametrize("square", [False, True])
    def test_three_axes_have_their_classes_where_the_loss_has_them(self, square):
        frames = 3 if square else 5
        x = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(1))
        labels = torch.randint(3, (2, frames))
        rows = [x[n, t].tolist() for n in range(2) for t in range(frames)]
        expected = mean(kl(row, [a + b for a, b in zip(row, BIAS, strict=True)]) for row in rows)
        last = term(lambda outputs: F.cross_entropy(outputs.transpose(1, 2), labels), x, BIAS, axis=2)
        second = term(lambda outputs: F.cross_entropy(outputs, labels), x.transpose(1, 2).contiguous(), BIAS, axis=1)
        assert last == pytest.approx(expected, rel=1e-4)
        assert second == pytest.approx(expected, rel=1e-4)

    def test_the_axis_may_be_said(self):
        x = ROWS[None].repeat(1, 1, 1).transpose(1, 2).contiguous()  # (1, 3 classes, 4 frames)
        loss = F.nll_loss
        found = term(lambda outputs: loss(outputs.log_softmax(1)[..., 0], torch.zeros(1).long()), x, BIAS, class_axis=1)
        expected = mean(kl(row, [a + b for a, b in zip(row, BIAS, strict=True)]) for row in ROWS.tolist())
        assert found == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("axis", [0, 4, -4])
    def test_an_axis_that_is_none(self, axis):
        with pytest.raises(ctl.SpecError, match=rf"class_axis must be an axis .* received {axis} for .*\(2, 3, 2, 4\)"):
            term(
                lambda outputs: F.cross_entropy(outputs, PIXELS),
                MAP,
                BIAS,
                class_axis=axis - (axis == 3) + 2 * (axis == 3),
            )

    def test_one_class_is_refused(self):
        with pytest.raises(ctl.SpecError, match=r"softmax of one logit is always 1; .*form='sigmoid'"):
            term(lambda outputs: F.cross_entropy(outputs, torch.zeros(4).long()), ROWS[:, :1], [0.5])


class TestLabels:
    def test_one_logit(self):
        """Its softmax is 1 whatever it is, so the term was exactly 0."""
        x = ROWS[:, :1]
        found = term(lambda o: F.binary_cross_entropy_with_logits(o, torch.ones(4, 1)), x, [0.7])
        assert found == pytest.approx(mean(binary_kl(a, a + 0.7) for a in x.flatten().tolist()), rel=1e-4)

    def test_one_logit_without_an_axis(self):
        class One(Shifted):
            def forward(self, x):
                return super().forward(x)[:, 0]

        adaptation = ctl.adapt(One(1), One(1), [ctl.OutputConservation(weight=1.0, temperature=1.0)])
        with torch.no_grad():
            adaptation.model.bias += 0.7
        outputs = adaptation.model(ROWS[:, :1])
        task = F.binary_cross_entropy_with_logits(outputs, torch.ones(4))
        expected = mean(binary_kl(a, a + 0.7) for a in ROWS[:, 0].tolist())
        assert (adaptation.loss(task, outputs, ROWS[:, :1]) - task).item() == pytest.approx(expected, rel=1e-4)

    def test_several_labels_at_once(self):
        """The mean over labels, like the loss. A shift of all logits together, which softmax cannot see, counts."""
        shift = [0.5, 0.5, 0.5]
        found = term(lambda o: F.binary_cross_entropy_with_logits(o, torch.ones(4, 3)), ROWS, shift)
        assert found == pytest.approx(mean(binary_kl(a, a + 0.5) for a in ROWS.flatten().tolist()), rel=1e-4)
        assert term(lambda o: F.cross_entropy(o, torch.zeros(4).long()), ROWS, shift) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda o: F.binary_cross_entropy(o.sigmoid(), torch.ones_like(o)),
            lambda o: F.multilabel_soft_margin_loss(o, torch.ones_like(o)),
            lambda o: -F.logsigmoid(o).mean(),
            lambda o: ((1 - o.sigmoid()) ** 2 * F.softplus(-o)).mean(),  # focal
        ],
    )
    def test_losses_of_labels(self, loss):
        expected = mean(binary_kl(a, a + b) for row in ROWS.tolist() for a, b in zip(row, BIAS, strict=True))
        assert term(loss, ROWS, BIAS) == pytest.approx(expected, rel=1e-4)

    def test_with_rho_it_is_the_loss_of_mixed_labels(self):
        """(1 - rho) BCE(y) + rho BCE(p0) = BCE((1 - rho) y + rho p0)."""
        adaptation = ctl.adapt(Shifted(3), Shifted(3), [ctl.OutputConservation(rho=0.3)])
        with torch.no_grad():
            adaptation.model.bias.copy_(torch.tensor(BIAS))
        labels = torch.randint(2, (4, 3)).float()
        outputs = adaptation.model(ROWS)
        loss = adaptation.loss(F.binary_cross_entropy_with_logits(outputs, labels), outputs, ROWS)
        mixed = 0.7 * labels + 0.3 * ROWS.sigmoid()
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(outputs, mixed))

    def test_probabilities_are_refused(self):
        with pytest.raises(ctl.SpecError, match=r"as probabilities.*return logits.*form='softmax'"):
            term(lambda o: F.binary_cross_entropy(o, torch.ones_like(o)), torch.full((2, 3), 0.5), [0.1, 0.1, 0.1])


class TestNumbers:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda o: F.mse_loss(o, torch.zeros_like(o)),
            lambda o: F.l1_loss(o, torch.zeros_like(o)),
            lambda o: F.smooth_l1_loss(o, torch.zeros_like(o)),
            lambda o: F.huber_loss(o, torch.zeros_like(o)),
            lambda o: ((o - 1) ** 2).mean(),
        ],
    )
    @pytest.mark.parametrize("columns", [1, 3])
    def test_the_squared_distance(self, loss, columns):
        found = term(loss, ROWS[:, :columns], BIAS[:columns])
        assert found == pytest.approx(mean(b**2 for b in BIAS[:columns]), rel=1e-4)

    def test_the_temperature_changes_nothing(self):
        assert term(lambda o: F.mse_loss(o, o.detach()), ROWS, BIAS, form="squared") == pytest.approx(
            mean(b**2 for b in BIAS), rel=1e-4
        )


def test_a_loss_that_says_nothing_is_refused_until_the_form_is_said():
    with pytest.raises(ctl.SpecError, match=r"OutputConservation: .*loss \(Mean\) says neither.*form='softmax'"):
        term(lambda outputs: outputs.mean(), ROWS, BIAS)
    expected = mean(kl(row, [a + b for a, b in zip(row, BIAS, strict=True)]) for row in ROWS.tolist())
    assert term(lambda outputs: outputs.mean(), ROWS, BIAS, form="softmax") == pytest.approx(expected, rel=1e-4)


def test_a_loss_of_two_kinds_is_refused():
    labels = torch.zeros(4).long()
    with pytest.raises(ctl.SpecError, match=r"as classes .* and as labels"):
        term(lambda o: F.cross_entropy(o, labels) + F.binary_cross_entropy_with_logits(o, o.detach()), ROWS, BIAS)


def test_a_penalty_inside_the_loss_does_not_decide():
    """Only operations between the outputs and the loss say what the outputs are."""
    weight = nn.Parameter(torch.ones(3))
    labels = torch.zeros(4).long()
    expected = mean(kl(row, [a + b for a, b in zip(row, BIAS, strict=True)]) for row in ROWS.tolist())
    found = term(lambda o: weight.sigmoid().sum() + weight.square().sum() + F.cross_entropy(o, labels), ROWS, BIAS)
    assert found == pytest.approx(expected, rel=1e-3)


def test_six_axes_are_refused():
    x = torch.randn(1, 3, 1, 1, 1, 2)
    with pytest.raises(ctl.SpecError, match=r"outputs must be .*received shape \(1, 3, 1, 1, 1, 2\)"):
        term(lambda o: o.mean(), x, BIAS, form="softmax")


@pytest.mark.parametrize(
    ("loss", "labels", "expected"),
    [
        (F.binary_cross_entropy_with_logits, torch.ones(4, 3), "sigmoid"),
        (F.mse_loss, torch.ones(4, 3), "squared"),
        (F.cross_entropy, torch.tensor([0, 1, 2, 0]), "softmax"),
    ],
)
def test_fit_chooses_by_its_loss(loss, labels, expected):
    """A step by plain gradient descent with the form found is that with the form said."""

    def trained(form):
        torch.manual_seed(0)
        source = nn.Linear(3, 3)
        adaptation = ctl.adapt(nn.Linear(3, 3), source, [ctl.OutputConservation(rho=0.5, form=form)])
        training = ctl.Training(epochs=3, optimizer="sgd", lr=0.5, device="cpu")
        metrics = lambda *_: {}  # noqa: E731
        ctl.fit(adaptation, (ROWS, labels), training=training, loss=lambda o, b: loss(o, b[1]), metrics=metrics, seed=0)
        return adaptation.model.weight

    found = trained(None)
    assert torch.equal(found, trained(expected))
    other = "squared" if expected != "squared" else "sigmoid"
    assert not torch.allclose(found, trained(other))


def test_a_model_with_labels_of_its_own_takes_the_form_of_its_loss():
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=1.0, temperature=1.0)])
    with torch.no_grad():
        model[0].bias += 0.3
    outputs = model(ROWS)
    task = F.binary_cross_entropy_with_logits(outputs, torch.ones(4, 2))
    ours, theirs = source[1](model[0](ROWS)), source(ROWS)
    expected = mean(binary_kl(a, b) for a, b in zip(theirs.flatten().tolist(), ours.flatten().tolist(), strict=True))
    assert (adaptation.loss(task, outputs, ROWS) - task).item() == pytest.approx(expected, rel=1e-3)


WEIGHTS = torch.randn(3, 5, generator=GENERATOR)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs: F.cross_entropy(F.normalize(outputs) @ WEIGHTS, Y),
        lambda outputs: F.cross_entropy(-(outputs[:, None] - WEIGHTS.T).square().sum(-1), Y),
        lambda outputs: F.binary_cross_entropy_with_logits(outputs @ WEIGHTS, torch.ones(4, 5)),
    ],
)
def test_embeddings_with_a_head_outside_the_model_are_numbers(loss):
    """The squared distance is the mean of the biases' squares: (0.09 + 0.04 + 0.01) / 3."""
    assert term(loss, ROWS, BIAS) == pytest.approx(0.14 / 3, rel=1e-3)


def test_a_map_that_the_loss_enlarges_is_of_classes():
    labels = PIXELS.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = term(lambda outputs: F.cross_entropy(F.interpolate(outputs, scale_factor=2), labels), MAP, BIAS)
    assert found == pytest.approx(TestClasses().by_pixel(), rel=1e-4)


def test_the_plan_says_how_the_first_loss_took_the_outputs():
    adaptation = ctl.adapt(Shifted(3), Shifted(3), [ctl.OutputConservation()])
    assert "at temperature 1 or squared distance" in str(adaptation.plan)
    outputs = adaptation.model(ROWS)
    adaptation.loss(outputs.square().mean(), outputs, ROWS)
    assert "OutputConservation: the task's loss takes the outputs as numbers" in str(adaptation.plan)


class Enlarged(nn.Module):
    """Its head's map is enlarged twofold."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, classes, 1)

    def forward(self, x):
        return F.interpolate(self.head(self.body(x)), scale_factor=2)


def test_ignored_pixels_of_an_enlarged_map_leave_out_the_heads_positions_below_them():
    torch.manual_seed(0)
    source, model = Enlarged(5), Enlarged(2)
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=1.0, temperature=1.0)])
    with torch.no_grad():
        model.body.bias += 0.3
    labels = torch.zeros(2, 4, 8, dtype=torch.long)
    labels[:, :2] = -100  # the upper of two rows
    labels[0, 2, 0] = -100  # one of four pixels over a position
    outputs = model(MAP)
    task = F.cross_entropy(outputs, labels)
    ours, theirs = (source.head(one.body(MAP))[:, :, 1].movedim(1, -1).reshape(-1, 5) for one in (model, source))
    expected = mean(kl(a, b) for a, b in zip(theirs.tolist(), ours.tolist(), strict=True))
    assert (adaptation.loss(task, outputs, MAP) - task).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", [None, "softmax", "squared"])
def test_a_loss_as_outputs_is_named(form):
    adaptation = ctl.adapt(Shifted(3), Shifted(3), [ctl.OutputConservation(form=form)])
    loss = adaptation.model(ROWS).square().mean()
    with pytest.raises(ctl.SpecError, match="a scalar, as of a model that returns its loss"):
        adaptation.loss(loss, loss, source=View(loss.detach()))


def test_a_plan_of_an_earlier_version_means_what_it_meant():
    old = {"kind": "outputs", "by": "OutputConservation", "weight": 0.5, "temperature": 2.0, "divergence": "kl"}
    read = OutputConservationTerm.model_validate(old)
    assert read == OutputConservationTerm(by="OutputConservation", weight=0.5, temperature=2.0)
    found = term(lambda o: F.cross_entropy(o, torch.zeros(4).long()), ROWS, BIAS, weight=0.5)
    expected = mean(kl(row, [a + b for a, b in zip(row, BIAS, strict=True)]) for row in ROWS.tolist())
    assert found == pytest.approx(0.5 * expected, rel=1e-4)


def language_loss(labels):
    """The loss of the next token as many write it: outputs without the last, labels without the first position."""
    return lambda outputs: F.cross_entropy(outputs[:, :-1].reshape(-1, outputs.shape[-1]), labels[:, 1:].reshape(-1))


def test_of_shifted_labels_the_positions_before_them_count():
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, -100], [0, -100, 1, 2]])
    bias = [0.5, -1.0, 0.3]
    found = term(language_loss(labels), x, bias, axis=2)
    counted = [x[0, 0], x[0, 1], x[1, 1], x[1, 2]]  # those whose next label counts
    shifted = torch.tensor(bias)
    assert found == pytest.approx(mean(kl(row.tolist(), (row + shifted).tolist()) for row in counted), rel=1e-4)


def test_labels_of_a_ctc_loss_say_nothing_of_the_frames():
    """Even if there are as many: a text padded with -100 to the number of frames."""
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, -100], [1, -100, -100, -100]])
    bias = [0.5, -1.0, 0.3]
    adaptation = ctl.adapt(Shifted(3, 2), Shifted(3, 2), [ctl.OutputConservation(weight=1.0, temperature=1.0)])
    with torch.no_grad():
        adaptation.model.bias.copy_(torch.tensor(bias))
    outputs = adaptation.model(x)
    scores = outputs.log_softmax(-1).transpose(0, 1)
    task = F.ctc_loss(scores, labels.clamp(min=0), torch.tensor([4, 4]), torch.tensor([2, 1]))
    found = adaptation.loss(task, outputs, x, batch={"inputs": x, "labels": labels}) - task
    rows = x.flatten(0, 1)
    expected = mean(kl(row.tolist(), (row + torch.tensor(bias)).tolist()) for row in rows)
    assert found.item() == pytest.approx(expected, rel=1e-4)


class Computes(nn.Module):
    """A model that returns its loss beside its outputs, (N, positions, classes)."""

    def __init__(self):
        super().__init__()
        self.shifted = Shifted(3, 2)

    def forward(self, x, labels=None):
        logits = self.shifted(x)
        return {"logits": logits} if labels is None else {"loss": language_loss(labels)(logits), "logits": logits}


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "single precision"])
def test_outputs_that_a_wrapper_passes_on_are_those_of_the_loss(process_group, wrapper):
    """DDP and Accelerate return other tensors than the loss was computed of; the loss still says what counts."""
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([[-100, 1, 2, -100], [0, -100, 1, 2]])
    chosen = ctl.OutputConservation(weight=1.0, temperature=1.0)
    adaptation = ctl.adapt(Computes(), Computes(), [chosen])
    model = adaptation.model
    with torch.no_grad():
        model.shifted.bias.copy_(torch.tensor([0.5, -1.0, 0.3]))
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    outputs = model(x, labels)
    if wrapper != "ddp":
        outputs = {name: value.float() for name, value in outputs.items()}
    loss = outputs["loss"] * 2  # as a Trainer of two processes does
    found = adaptation.loss(loss, outputs, {"x": x, "labels": labels}) - loss
    counted = [x[0, 0], x[0, 1], x[1, 1], x[1, 2]]
    bias = torch.tensor([0.5, -1.0, 0.3])
    expected = mean(kl(row.tolist(), (row + bias).tolist()) for row in counted)
    assert found.item() == pytest.approx(expected, rel=1e-4)
