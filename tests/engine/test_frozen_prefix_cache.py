"""A frozen input side is cached if that changes nothing but rounding, and only then."""

from __future__ import annotations

import copy
import os
import random
import secrets

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import conservtl as ctl
from conservtl.layers import select
from conservtl.tasks.vision.cifar_resnet import CifarResNet


class Flow(nn.Module):
    """Base of the tests' models: stem, body, head. Inputs are (N, 6)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class DropoutInside(Flow):
    def forward(self, x):
        return self.head(self.body(nn.functional.dropout(self.stem(x), 0.3, self.training)))


class DropoutBehind(Flow):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.body(self.stem(x)), 0.3, self.training))


class Skip(Flow):
    def forward(self, x):
        inner = self.stem(x)
        return self.head(self.body(inner) + inner)


class SilentSkip(Flow):
    """A skip behind a gate that is closed at first: it shows in no output, and its gradient is all that opens it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        inner = self.stem(x)
        out = self.head(self.body(inner))
        out += self.gate * inner[:, :3]
        return out


class SkipInTraining(Flow):
    """An auxiliary output that only training has, as in GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(8, 3)

    def forward(self, x):
        inner = self.stem(x)
        out = self.head(self.body(inner))
        return out + self.side(inner) if self.training else out


class Twice(Flow):
    def forward(self, x):
        return self.head(self.body(self.body(self.stem(x))))


class TwiceFarApart(Flow):
    """The frozen body runs a second time after a trained layer."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.body(self.middle(self.body(self.stem(x)))))


class Remembering(Flow):
    """Passes its skip through an attribute, which a placeholder would leave stale."""

    def __init__(self):
        super().__init__()
        self.body.register_module("tap", Tap())

    def forward(self, x):
        out = self.body(self.stem(x))
        return self.head(out + self.body.tap.seen)


class Tap(nn.Module):
    def forward(self, x):
        self.seen = x
        return x


class BatchDependent(Flow):
    """A norm over the batch that keeps no statistics: an example's output depends on its neighbours."""

    def __init__(self):
        super().__init__()
        self.stem.add_module("norm", nn.BatchNorm1d(8, track_running_stats=False))


class Spectral(Flow):
    """Power iteration: the frozen weight's norm changes with every step it is used in."""

    def __init__(self):
        super().__init__()
        torch.nn.utils.parametrizations.spectral_norm(self.body[0])


class TrainedFirst(Flow):
    """A trained shift of the inputs, used before anything frozen, registered last."""

    def __init__(self):
        super().__init__()
        self.late = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return super().forward(x + self.late)


class Norms(Flow):
    def __init__(self):
        super().__init__()
        self.stem.add_module("norm", nn.BatchNorm1d(8))
        self.body.add_module("norm", nn.BatchNorm1d(8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), self.head)


class Recurrent(nn.Module):
    """Two layers in one LSTM module, which returns a tuple; modules before it can be cached."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.stem(x.view(len(x), 3, 2)))[0][:, -1])


class TimeFirst(Recurrent):
    """The same with time as the first axis: as many time steps as examples are not taken for rows."""

    def forward(self, x):
        inner = self.stem(x.view(len(x), 3, 2).repeat(1, 8, 1).transpose(0, 1))
        return self.head(inner.mean(0))


CASES = [
    (Flow, ["stem*", "body*"], True),
    (Norms, ["stem*", "body*"], True),
    (DropoutBehind, ["stem*", "body*"], True),
    (Recurrent, ["stem*", "lstm*"], True),
    (Recurrent, ["stem*", "lstm.*_l0"], True),
    (DropoutInside, ["stem*", "body*"], False),
    (Skip, ["stem*"], True),  # the skip begins at the boundary
    (Skip, ["stem*", "body*"], False),
    (SilentSkip, ["stem*", "body*"], False),
    (SkipInTraining, ["stem*", "body*"], False),
    (Twice, ["stem*", "body*"], True),  # as far as the stem
    (TwiceFarApart, ["stem*", "body*"], True),
    (Remembering, ["stem*", "body*"], False),
    (BatchDependent, ["stem*", "body*"], False),
    (Spectral, ["stem*", "body*"], False),
    (TrainedFirst, ["stem*", "body*"], False),
    (TimeFirst, ["stem*"], False),
]


def train(model, frozen, keep, *, epochs=3, data=None, **options):
    """Train a copy of a model with these parameters frozen; its source is itself."""
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    held = select(frozen, names)
    stage = ctl.Stage(train=[name for name in names if not any(name in found for found in held.values())])
    adaptation = ctl.adapt(
        model, copy.deepcopy(model), [ctl.GradualUnfreezing(phases=[stage]), *options.pop("also", ())]
    )
    if data is None:
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    training = ctl.Training(
        device="cpu", epochs=epochs, batch_size=16, **{"optimizer": "sgd", "lr": 0.05, **options.pop("set", {})}
    )
    result = ctl.fit(adaptation, data, training=training, keep_frozen_outputs=keep, seed=2, **options)
    return adaptation, result


def close(a, b, rtol=1e-4, atol=1e-5):
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "frozen", "kept"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_training_is_the_same(kind, frozen, kept):
    """Training with and without the cache agrees up to rounding; it is used in the expected cases."""
    torch.manual_seed(0)
    model = kind()
    ours, result = train(model, frozen, keep=True)
    theirs, without = train(model, frozen, keep=False)
    assert (result.kept_outputs, without.kept_outputs) == (kept, False)
    close(ours.model, theirs.model)
    assert [line["loss"] for line in result.history] == pytest.approx([line["loss"] for line in without.history])


def _vision(name):
    if name == "cifar_resnet":
        return CifarResNet(20, 3), 16
    if name == "vit_b_16":
        return torchvision.models.VisionTransformer(32, 16, 4, 2, 24, 48, num_classes=3), 32
    return torchvision.models.get_model(name, num_classes=3), 32


RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _unfrozen(monkeypatch):
    """Make the generator anew: what was there when tests were collected is frozen, and hidden from ``gc``."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


GENERATOR = torch.Generator()


def _rarely(draw):
    """Noise that a step has with a probability of 5 %, and of a thousandth of the values: no output need show it."""
    return 1e-3 * draw() if draw() < 0.05 else 0.0


class OwnGenerator(Flow):
    """Holds its generator in a list."""

    def __init__(self):
        super().__init__()
        self.body.own = [np.random.default_rng(0)]

    def noise(self):
        return _rarely(self.body.own[0].random)


class Counting(Flow):
    """Not random: another result each time."""

    def __init__(self):
        super().__init__()
        self.body.calls = 0

    def noise(self):
        self.body.calls += 1
        return 1e-3 * self.body.calls


NOISES = {
    "numpy": lambda: _rarely(np.random.rand),
    "every other normal number": lambda: 1e-3 * np.random.randn(),  # noqa: NPY002
    "random": lambda: _rarely(random.random),
    "random's other functions": lambda: _rarely(lambda: random.uniform(0, 1)),
    "a generator outside the model": lambda: _rarely(RNG.random),
    "a generator for each call": lambda: _rarely(np.random.default_rng().random),
    "an old one for each call": lambda: _rarely(np.random.RandomState().rand),
    "Python's for each call": lambda: _rarely(lambda: random.Random().random()),
    "the system's": lambda: _rarely(lambda: int.from_bytes(os.urandom(2), "big") / 65536),
    "secrets": lambda: _rarely(lambda: secrets.randbelow(1000) / 1000),
    "torch's, of one's own": lambda: _rarely(lambda: float(torch.rand((), generator=GENERATOR))),
}


class Noisy(Flow):
    """Noise inside the frozen body."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return self.head(self.body(self.stem(x) + self.noise()))


class _Stem(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self.noise[0]()


@pytest.mark.parametrize("noise", [*NOISES, OwnGenerator, Counting])
@pytest.mark.parametrize("seed", range(2))
def test_randomness_that_is_not_torchs(noise, seed):
    """A frozen input side that draws from anywhere is not kept, however rarely the draw matters."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = noise() if isinstance(noise, type) else Flow()
    draw = model.noise if isinstance(noise, type) else NOISES[noise]
    model.stem = _Stem(*model.stem)
    model.stem.noise = [draw]
    assert not train(model, ["stem*", "body*"], keep=True, epochs=1)[1].kept_outputs


def test_seeded_randomness_is_kept_and_trials_draw_nothing():
    """A generator that each call seeds anew gives the same numbers; and looking for draws uses none up."""
    model = Flow()
    model.stem = _Stem(*model.stem)
    model.stem.noise = [lambda: np.random.default_rng(3).random()]
    assert train(model, ["stem*", "body*"], keep=True, epochs=1)[1].kept_outputs
    own, kept = np.random.default_rng(1), []
    model.stem.noise = [lambda: float(own.random())]
    start = own.bit_generator.state
    for keep in (False, True):
        own.bit_generator.state = start
        kept.append(train(model, ["stem*", "body*"], keep=keep, epochs=1)[0].model.head.weight)
    assert torch.equal(*kept)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit_b_16", "mobilenet_v3_small", "cifar_resnet"])
def test_networks_for_images(name):
    """With half of the layers frozen: the same weights as without the cache, and unchanged frozen norms."""
    torch.manual_seed(0)
    model, size = _vision(name)
    if name == "vgg11_bn":
        model.avgpool, model.classifier = (
            nn.AdaptiveAvgPool2d(1),
            nn.Sequential(nn.Flatten(), nn.Linear(512, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)),
        )
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(6, 3, size, size, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    results = {}
    for keep in (True, False):
        copied = copy.deepcopy(model)
        layers = len(ctl.find_layers(copied)) // 2
        transfer = ctl.LayerTransfer(side="input", layers=layers)
        adaptation = ctl.adapt(copied, copy.deepcopy(model), [transfer])
        training = ctl.Training(device="cpu", epochs=2, batch_size=3, optimizer="sgd", lr=1e-3)
        result = ctl.fit(adaptation, data, training=training, keep_frozen_outputs=keep, seed=2)
        results[keep] = adaptation
        assert result.kept_outputs == keep
    close(results[True].model, results[False].model, rtol=1e-3, atol=1e-4)
    frozen = results[True].frozen
    before = model.state_dict()
    norms = {name.rpartition(".")[0] for name in frozen if results[True].plan[name].kind == "norm"}
    for key, tensor in results[True].model.state_dict().items():
        if key in frozen or key.rpartition(".")[0] in norms:
            assert torch.equal(tensor, before[key]), key


def test_the_saving_is_real():
    """Frozen modules run once per example, whatever the number of epochs."""
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    class Counted(Flow):
        def __init__(self):
            super().__init__()
            self.body.add_module("counting", Counting())

    torch.manual_seed(0)
    train(Counted(), ["stem*", "body*"], keep=True, epochs=10)
    assert sum(seen) <= 40 + 2 * 20  # all examples once, and the probe
    seen.clear()
    train(Counted(), ["stem*", "body*"], keep=False, epochs=10)
    assert sum(seen) == 400


def test_placeholders_cost_nothing_where_they_can():
    """Code between frozen modules runs on tensors without storage if it can."""
    devices = set()

    class Between(Flow):
        def forward(self, x):
            inner = self.stem(x)
            devices.add(inner.device.type)
            return self.head(self.body(inner.relu()))

    torch.manual_seed(0)
    _, result = train(Between(), ["stem*", "body*"], keep=True)
    assert result.kept_outputs
    assert devices == {"cpu", "meta"}


def test_augmented_data_is_not_kept():
    torch.manual_seed(0)
    model = Flow()
    augment = lambda batch, generator: (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1])  # noqa: E731
    assert not train(model, ["stem*"], keep=True, augment=augment)[1].kept_outputs


def test_streamed_data_is_not_kept():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.long))]
    assert not train(Flow(), ["stem*"], keep=True, data=batches)[1].kept_outputs


def test_a_hook_of_the_users_keeps_seeing_what_it_listens_to():
    torch.manual_seed(0)
    model = Flow()
    model.stem[0].register_forward_hook(lambda *_: None)
    assert not train(model, ["stem*"], keep=True)[1].kept_outputs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(precision):
    torch.manual_seed(0)
    model = Norms()
    settings = {"precision": precision}
    ours, result = train(model, ["stem*", "body*"], keep=True, set=settings)
    theirs, _ = train(model, ["stem*", "body*"], keep=False, set=settings)
    assert result.kept_outputs
    close(ours.model, theirs.model, *((1e-4, 1e-5) if precision == "fp32" else (2e-2, 2e-3)))


def test_methods_are_given_back():
    """Afterwards every module computes again, and a forward set on an object is restored."""
    torch.manual_seed(0)
    model = Flow()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    adaptation, result = train(model, ["stem*", "body*"], keep=True)
    assert result.kept_outputs
    assert {name: set(module.__dict__) for name, module in adaptation.model.named_modules()} == attributes


def test_each_phase_keeps_its_own():
    """Unfrozen modules compute again; those still frozen stay cached."""
    torch.manual_seed(0)
    data = torch.randn(40, 6), torch.randint(0, 3, (40,))
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = Norms()
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.GradualUnfreezing(by="layer", epochs=2)])
        training = ctl.Training(device="cpu", epochs=6, batch_size=16, lr=0.05, optimizer="sgd")
        result = ctl.fit(adaptation, data, training=training, seed=1, keep_frozen_outputs=keep)
        assert result.kept_outputs == keep
        results.append(adaptation.model)
    close(*results)


def test_one_example():
    """A probe of one example, in a batch of one."""
    torch.manual_seed(0)
    data = torch.randn(1, 6), torch.zeros(1, dtype=torch.long)
    assert train(Flow(), ["stem*"], keep=True, data=data)[1].kept_outputs
