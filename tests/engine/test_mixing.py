"""``Training.mixup`` and ``Training.cutmix``: pairs of images and their labels are mixed, as by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

pytest.importorskip("torchvision.transforms.v2")


class Images(nn.Module):
    """A small network on images (N, 3, 8, 8) with four classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, pixels):
        return self.head(self.stem(pixels).mean((-2, -1)))


@pytest.fixture
def adapted():
    def make(*strategies):
        torch.manual_seed(0)
        model, source = Images(), Images()
        return ctl.adapt(model, source, strategies)

    return make


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(20, 3, 8, 8, generator=generator), torch.randint(4, (20,), generator=generator)


def mixed_by_hand(batch, generator):
    """Mix each image with the one before it; the share is drawn from Beta(0.4, 0.4)."""
    pixels, labels = batch
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        share = torch.distributions.Beta(torch.tensor([0.4]), torch.tensor([0.4])).sample().item()
    one_hot = torch.eye(4)[labels]
    return share * pixels + (1 - share) * pixels.roll(1, 0), share * one_hot + (1 - share) * one_hot.roll(1, 0)


def close(one, other):
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("strategy", [ctl.L2SP(), ctl.OutputConservation()])
@pytest.mark.parametrize("form", ["held", "dictionary", "batches"])
def test_mixup_is_the_formula(adapted, images, strategy, form):
    expected, found = adapted(strategy), adapted(strategy)
    training = ctl.Training(epochs=2, batch_size=8, optimizer="sgd", lr=0.05, device="cpu")
    ctl.fit(expected, images, training=training, augment=mixed_by_hand, seed=3)
    data = images
    if form == "dictionary":
        data = {"pixels": images[0], "labels": images[1].int()}
    if form == "batches":
        data = _Shuffled(images)
    ctl.fit(found, data, training=training.model_copy(update={"mixup": 0.4}), seed=3)
    close(found, expected)


class _Shuffled:
    """Batches in the order that held data has."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return ((self.data[0][index], self.data[1][index]) for index in torch.randperm(20).split(8))


def test_cutmix_pastes_a_part_of_another_image(adapted, images):
    """Every pixel is the image's own or the other's, and labels have the share of the area."""
    seen = []

    def loss(outputs, batch):
        seen.append(batch)
        return F.cross_entropy(outputs, batch[1])

    training = ctl.Training(epochs=4, batch_size=20, cutmix=1.0, device="cpu")
    ctl.fit(adapted(), images, training=training, loss=loss, seed=0, augment=lambda batch, _: batch)
    pasted = 0
    for pixels, labels in seen[-4:]:
        order = [int((pixels == one).flatten(1).sum(1).argmax()) for one in images[0]]
        for place, image, own in zip(order, *images, strict=True):
            kept = (pixels[place] == image).all(0)
            pasted += not kept.all()
            assert labels[place].sum().item() == pytest.approx(1.0)
            assert labels[place][own].item() >= kept.float().mean().item() - 1e-6
    assert pasted


def test_both_are_drawn_for_each_batch(adapted, images):
    """Some batches have pixels of two images one beside the other, some their sums."""
    kinds = set()

    def loss(outputs, batch):
        whole = (batch[0][:, None] == images[0][None]).flatten(2).any(-1).any()
        kinds.add(bool(whole))
        return F.cross_entropy(outputs, batch[1])

    training = ctl.Training(epochs=12, batch_size=20, mixup=1.0, cutmix=1.0, device="cpu")
    ctl.fit(adapted(), images, training=training, loss=loss, seed=0)
    assert kinds == {True, False}


def test_a_run_goes_on_with_the_same_mixtures(adapted, images, tmp_path, interrupting, same):
    training = ctl.Training(epochs=3, batch_size=8, mixup=0.4, ema=0.5, device="cpu")
    whole, rest = adapted(), adapted()
    ctl.fit(whole, images, training=training, seed=3)
    with pytest.raises(KeyboardInterrupt):
        ctl.fit(adapted(), images, training=training, seed=3, out=tmp_path, forward=interrupting(5))
    ctl.fit(rest, images, training=training, out=tmp_path, resume=True)
    assert same(rest.model, whole.model)


def test_nothing_global_is_drawn(adapted, images):
    """The order of batches is the same with and without."""
    orders = []
    for mixup in (None, 0.4):
        seen = []

        def loss(outputs, batch, seen=seen):
            seen.append(torch.get_rng_state())
            return F.cross_entropy(outputs, batch[1])

        training = ctl.Training(epochs=2, batch_size=8, mixup=mixup, device="cpu")
        ctl.fit(adapted(), images, training=training, loss=loss, augment=lambda batch, _: batch, seed=3)
        orders.append(seen[-1])
    assert torch.equal(*orders)


def test_evaluations_are_of_whole_images(adapted, images):
    adaptation = adapted()
    training = ctl.Training(epochs=1, mixup=0.4, device="cpu", batch_norm="eval")
    line = ctl.fit(adaptation, images, watch={"target": images}, training=training).history[-1]
    with torch.no_grad():
        outputs = adaptation.model.eval()(images[0])
    assert line["target"]["loss"] == pytest.approx(F.cross_entropy(outputs, images[1]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ((torch.randn(8, 5), torch.zeros(8).long()), {}, r"mixes images \(N, C, H, W\)"),
        ((torch.randn(8, 3, 8, 8), torch.zeros(8)), {}, r"integers \(N,\); received float32 of shape \(8,\)"),
        ((torch.randn(8, 3, 8, 8), torch.full((8,), -100)), {}, "mixes every label of a batch; received -100"),
        (
            (torch.randn(8, 3, 8, 8), torch.zeros(8).long()),
            {"loss": lambda outputs, batch: F.nll_loss(outputs.log_softmax(-1), batch[1])},
            "which the loss must take",
        ),
    ],
)
def test_data_that_cannot_be_mixed_is_refused_before_training(data, options, expected):
    torch.manual_seed(0)
    model = Images() if data[0].ndim == 4 else nn.Linear(5, 4)
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP()])
    for name in ("mixup", "cutmix"):
        with pytest.raises(ctl.SpecError, match=expected):
            ctl.fit(adaptation, data, training=ctl.Training(**{name: 0.4}), **options)
    assert all(drift == 0 for drift in adaptation.drift().values())


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_share_needs_a_positive_parameter(name, value):
    with pytest.raises(ValidationError):
        ctl.Training(**{name: value})


def test_timms_mixup_is_an_augmentation(tmp_path):
    """Two runs of a seed are equal, though timm draws from NumPy's global generator."""
    mixup = pytest.importorskip("timm.data").Mixup(mixup_alpha=0.4, label_smoothing=0.1, num_classes=3)
    images, labels = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3

    def trained(augment):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP()])
        training = ctl.Training(epochs=2, batch_size=8, device="cpu")
        ctl.fit(adaptation, (images, labels), training=training, augment=augment, seed=0)
        return model[1].weight.detach()

    mixed = trained(lambda batch, generator: mixup(*(part.clone() for part in batch)))
    assert torch.equal(mixed, trained(lambda batch, generator: mixup(*(part.clone() for part in batch))))
    assert not torch.equal(mixed, trained(None))
