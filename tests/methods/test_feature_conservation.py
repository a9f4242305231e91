"""DELTA and LDIFS against their formulas; attention against one forward a channel; taps that miss nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.feature_conservation.distance import delta, ldifs
from conservtl.runtime.layer_features import channel_axis

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Residual(nn.Module):
    """Its last module's output is written into by what comes next."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        found = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        found += x
        return found


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block1, self.block2 = Residual(4), Residual(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.head(self.relu(self.block2(self.block1(x))).mean((2, 3)))

    def features(self, x):
        """What the layers give, before anything else is done to it."""
        stem = self.bn(self.conv(x))
        one = self.block1(stem.relu())
        return {"conv": stem, "block1": one, "block2": self.block2(one.clone())}


def net(seed=0, classes=3):
    torch.manual_seed(seed)
    return Net(classes).double()


def moved(*strategies, classes=3, **options):
    """Adapted, in eval mode, its weights away from the source's."""
    source = net(7)
    adaptation = ctl.adapt(net(classes=classes), source, strategies, example=X, **options)
    adaptation.measure([(X, Y)])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in adaptation.model.named_parameters():
            if not name.startswith("head"):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    adaptation.model.eval()
    return adaptation, source.eval()


def term(adaptation, x=X, y=Y):
    """What the strategies add to the loss."""
    outputs = adaptation.model(x)
    loss = F.cross_entropy(outputs, y)
    return adaptation.loss(loss, outputs, x) - loss


def plain_delta(ours, theirs, weights=None):
    total = 0.0
    for i in range(ours.shape[0]):
        for c in range(ours.shape[1]):
            w = 1.0 if weights is None else weights[c]
            total = total + w * (ours[i, c] - theirs[i, c]).square().sum() / ours[0, 0].numel()
    return total / (2 * ours.shape[0])


def plain_ldifs(ours, theirs):
    total = 0.0
    for i in range(ours.shape[0]):
        for a, b in zip(ours[i].flatten(1).T, theirs[i].flatten(1).T, strict=True):
            total = total + (a / a.norm() - b / b.norm()).square().sum() / ours[0, 0].numel()
    return total / ours.shape[0]


class TestValue:
    @pytest.mark.parametrize("metric", ["delta", "ldifs"])
    def test_value_and_gradient_are_the_formula(self, metric):
        """At all layers but the head's, though what follows writes into each layer's output."""
        adaptation, source = moved(ctl.FeatureConservation(alpha=0.7, metric=metric))
        assert adaptation.plan.terms[0].taps == ("conv", "block1", "block2")
        model = copy.deepcopy(adaptation.model)
        function = plain_delta if metric == "delta" else plain_ldifs
        with torch.no_grad():
            theirs = source.features(X)
        expected = 0.7 * sum(function(ours, theirs[layer]) for layer, ours in model.features(X).items())
        found = term(adaptation)
        torch.testing.assert_close(found, expected)
        found.backward()
        expected.backward()
        for (name, p), q in zip(adaptation.model.named_parameters(), model.parameters(), strict=True):
            if not name.startswith("head"):
                torch.testing.assert_close(
                    p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}", rtol=1e-6, atol=1e-9
                )

    @pytest.mark.parametrize("metric", ["delta", "ldifs"])
    def test_is_a_mean_over_the_batch(self, metric):
        """Elsewhere it grows with the batch size."""
        adaptation, _ = moved(ctl.FeatureConservation(metric=metric))
        torch.testing.assert_close(term(adaptation, torch.cat([X, X]), torch.cat([Y, Y])), term(adaptation))

    def test_is_zero_where_nothing_has_moved(self):
        adaptation, _ = moved(ctl.FeatureConservation(layers=("block1",)), ctl.LayerTransfer(layers=2))
        source = net(7)
        adaptation.model.load_state_dict(source.state_dict())
        found = term(adaptation)
        assert found == 0

    def test_layers_above_nothing_that_is_trained_are_harmless(self):
        """A frozen input side gives the source's own features: no value, no gradient, no error."""
        adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(), ctl.LayerTransfer(layers=3)], example=X)
        adaptation.model.eval()
        loss = term(adaptation)
        assert loss == 0
        adaptation.model.zero_grad()
        outputs = adaptation.model(X)
        adaptation.loss(F.cross_entropy(outputs, Y), outputs, X).backward()
        assert adaptation.model.block2.conv2.weight.grad is None
        assert adaptation.model.head.weight.grad is not None

    def test_a_target_with_labels_of_its_own(self):
        adaptation, source = moved(ctl.FeatureConservation(layers=("block2",), alpha=1), classes=2)
        with torch.no_grad():
            theirs, ours = source.features(X)["block2"], adaptation.model.features(X)["block2"]
        torch.testing.assert_close(term(adaptation, y=Y.clamp(max=1)), plain_delta(ours, theirs))

    def test_features_that_are_zero_have_a_finite_gradient(self):
        features = torch.zeros(2, 3, 4, requires_grad=True)
        ldifs(features, torch.zeros(2, 3, 4), 1).backward()
        assert not features.grad.any()

    def test_half_precision_features_are_compared_in_float32(self):
        """A sum of many squares would be lost in half precision."""
        ours = torch.full((2, 512, 8, 8), 1.0, dtype=torch.bfloat16)
        theirs = torch.full((2, 512, 8, 8), 1.0078125, dtype=torch.bfloat16)
        assert delta(ours, theirs, 1).dtype is torch.float32
        torch.testing.assert_close(delta(ours, theirs, 1), torch.tensor(512 * 0.0078125**2 / 2))

    @pytest.mark.parametrize("function", [delta, ldifs])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_nothing_but_the_features_is_kept_for_the_backward_pass(self, function, dtype):
        """And the gradient is that of the formula in double precision."""
        generator = torch.Generator().manual_seed(0)
        ours, theirs = (torch.randn(2, 64, 5, 3, generator=generator).to(dtype) for _ in range(2))
        ours.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            value = function(ours, theirs, 1)
        vectors = {one.untyped_storage().data_ptr() for one in kept if one.numel() == ours.numel()}
        assert vectors <= {ours.data_ptr(), theirs.data_ptr()}
        value.backward()
        exact = ours.detach().double().requires_grad_()
        plain = {delta: plain_delta, ldifs: plain_ldifs}[function](exact, theirs.double())
        plain.backward()
        digits = {"rtol": 1e-2, "atol": 1e-5} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(value.double(), plain.double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.grad.double(), exact.grad, **digits)

    def test_under_fit_the_kept_features_of_the_source_are_used(self):
        """Twice the epochs do not run the source twice as often, and the loss is the same as with its forward."""
        runs = []
        for keeps in (True, False):
            adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(alpha=1.0)], example=X)
            calls = []
            adaptation.origin.source_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            ctl.fit(
                adaptation,
                (X, Y),
                training=ctl.Training(epochs=5, batch_size=3, batch_norm="eval"),
                seed=0,
                keep_frozen_outputs=keeps,
            )
            runs.append((len(calls), adaptation.model.block1.conv1.weight.detach().clone()))
        assert runs[0][0] < runs[1][0]
        torch.testing.assert_close(runs[0][1], runs[1][1])


class TestAttention:
    def expected(self, model, layer):
        """One forward a channel."""
        model = copy.deepcopy(model).eval()
        channels = 4
        module = {"conv": model.bn, "block1": model.block1}[layer]

        def loss(zeroed):
            def hook(_, __, output):
                output = output.clone()
                if zeroed is not None:
                    output[:, zeroed] = 0
                return output

            handle = module.register_forward_hook(hook)
            with torch.no_grad():
                found = F.cross_entropy(model(X), Y)
            handle.remove()
            return found

        rises = torch.stack([loss(channel) for channel in range(channels)]) - loss(None)
        return rises.softmax(0) * channels

    @pytest.mark.parametrize("elements", [1 << 24, 2000, 1])
    def test_is_that_of_one_forward_a_channel(self, elements, monkeypatch):
        """Whatever fits into a pass, and however the data is cut; 1 on average."""
        monkeypatch.setattr("conservtl.methods.feature_conservation.attention._ELEMENTS", elements)
        adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(attention=True)], example=X)
        adaptation.measure([(X[:4], Y[:4]), (X[4:], Y[4:])])
        for layer in ("conv", "block1"):
            found = adaptation.measured["attention"][layer]
            torch.testing.assert_close(found.double(), self.expected(adaptation.model, layer), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.mean(), torch.tensor(1.0))
            assert found.std() > 1e-3

    def test_takes_a_pass_a_layer_not_a_channel(self):
        adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(attention=True)], example=X)
        sizes = []
        adaptation.model.head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        adaptation.measure([(X, Y)])
        assert sorted(sizes) == [6] * (1 + 3) + [4 * 6] * 3

    def test_a_path_around_the_layer(self):
        """A tapped layer inside a residual branch: the whole model sees the copies then, and the result is the same."""

        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x):
                x = self.first(x)
                return self.head(x + self.second(x).tanh())

        torch.manual_seed(0)
        x = torch.randn(6, 3)
        adaptation = ctl.adapt(Around(), Around(), [ctl.FeatureConservation(attention=True, layers=("second",))])
        adaptation.measure([(x, Y)])
        model = adaptation.model
        with torch.no_grad():
            first = model.first(x)
            second = model.second(first)
            losses = [
                F.cross_entropy(model.head(first + (second * (torch.arange(3) != c)).tanh()), Y) for c in range(3)
            ]
        expected = torch.stack(losses).softmax(0) * 3
        torch.testing.assert_close(adaptation.measured["attention"]["second"], expected)

    def test_weighs_the_channels(self):
        adaptation, source = moved(ctl.FeatureConservation(alpha=0.7, attention=True, layers=("block1",)))
        w = adaptation.measured["attention"]["block1"].double()
        with torch.no_grad():
            ours, theirs = adaptation.model.features(X)["block1"], source.features(X)["block1"]
        torch.testing.assert_close(term(adaptation), 0.7 * plain_delta(ours, theirs, w))

    def test_measured_elsewhere_must_fit(self):
        """Missing layers and vectors that are none are refused before training, a wrong length at the first step."""
        adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(attention=True, layers=2)], example=X)
        assert adaptation.plan.terms[0].taps == ("conv", "block2")
        with pytest.raises(ctl.SpecError, match="that of 'block2' is missing"):
            adaptation.use_measured("attention", {"conv": torch.ones(4)})
        with pytest.raises(ctl.SpecError, match=r"that of 'block2' is of shape \(4, 1\)"):
            adaptation.use_measured("attention", {"conv": torch.ones(4), "block2": torch.ones(4, 1)})
        adaptation.use_measured("attention", {"conv": torch.ones(4), "block2": torch.ones(1)})
        with pytest.raises(ctl.SpecError, match=r"'block2' has 4 channels, but 'attention' weighs \(1,\)"):
            term(adaptation)

    def test_a_layer_that_sees_a_part_of_the_examples_is_refused(self):
        """An expert: two of six examples reach it, so two rows cannot be told from examples."""

        class Expert(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.expert, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

            def forward(self, x):
                hidden = self.first(x)
                chosen = torch.tensor([1, 4])
                return self.head(hidden.index_add(0, chosen, self.expert(hidden[chosen])))

        adaptation = ctl.adapt(Expert(), Expert(), [ctl.FeatureConservation(attention=True, layers=["expert"])])
        with pytest.raises(ctl.SpecError, match=r"'expert' gives outputs of shape \(2, 6\) for 6 examples"):
            adaptation.measure([(torch.randn(6, 4), Y)] * 2)

    def test_state_brings_it_back(self):
        ours, _ = moved(ctl.FeatureConservation(attention=True))
        theirs = ctl.adapt(net(), net(7), [ctl.FeatureConservation(attention=True)], example=X)
        theirs.load_state_dict(ours.state_dict())
        theirs.optimizer(torch.optim.SGD, lr=0.1)
        assert torch.equal(theirs.measured["attention"]["conv"], ours.measured["attention"]["conv"])


class TestTaps:
    @pytest.mark.parametrize(
        ("count", "expected"),
        [(1, ["7"]), (2, ["3", "7"]), (4, ["1", "3", "5", "7"]), (8, list("01234567")), (99, list("01234567"))],
    )
    def test_evenly_over_the_depth_without_the_head(self, count, expected):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.FeatureConservation(layers=count)])
        assert list(adaptation.plan.terms[0].taps) == expected

    def test_by_name_and_glob_in_the_order_of_depth(self):
        adaptation = ctl.adapt(net(), net(7), [ctl.FeatureConservation(layers=("block*", "conv"))], example=X)
        assert adaptation.plan.terms[0].taps == ("conv", "block1", "block2")

    def test_one_that_names_no_layer(self):
        with pytest.raises(ctl.SelectorError, match=r"'blok1': must match at least one layer.*Did you mean 'block1'"):
            ctl.adapt(net(), net(7), [ctl.FeatureConservation(layers=("blok1",))])

    def test_a_model_of_one_layer_has_none(self):
        with pytest.raises(ctl.SpecError, match="the model is one layer"):
            ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2), [ctl.FeatureConservation()])

    def test_fields(self):
        with pytest.raises(ValueError, match="needs metric='delta'"):
            ctl.FeatureConservation(metric="ldifs", attention=True)
        with pytest.raises(ValueError, match="at least one layer"):
            ctl.FeatureConservation(layers=())

    def test_recurrent_layers_give_tuples(self):
        """The first of what an LSTM gives is compared, channels last."""

        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.lstm(x)[0][:, -1])

        torch.manual_seed(0)
        x = torch.randn(6, 5, 3)
        source = Recurrent()
        adaptation = ctl.adapt(Recurrent(), source, [ctl.FeatureConservation(alpha=2.0, attention=True)])
        adaptation.measure([(x, Y)])
        assert adaptation.measured["attention"]["lstm"].shape == (4,)
        with torch.no_grad():
            adaptation.model.lstm.weight_hh_l0.add_(0.3)
            difference = adaptation.model.lstm(x)[0] - source.lstm(x)[0]
        expected = (difference.square() * adaptation.measured["attention"]["lstm"]).sum((1, 2)).mean() / 5
        torch.testing.assert_close(term(adaptation, x), expected)

    def test_a_compiled_model(self):
        """The taps see what it computes."""
        torch.manual_seed(0)
        adaptation, _ = moved(ctl.FeatureConservation(alpha=0.7))
        expected = term(adaptation)
        adaptation.model.compile(backend="eager")
        torch.testing.assert_close(term(adaptation), expected)

    def test_without_a_forward_pass(self):
        adaptation, _ = moved(ctl.FeatureConservation())
        outputs = adaptation.model(X)
        loss = F.cross_entropy(outputs, Y)
        adaptation.loss(loss, outputs, X)
        with pytest.raises(ctl.SpecError, match="made no forward pass"):
            adaptation.loss(loss, outputs, X)


@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda: nn.Conv1d(3, 4, 3), (2, 4, 9), 1),
        (lambda: nn.Conv2d(3, 4, 3), (2, 4, 9, 9), 1),
        (lambda: nn.Linear(3, 4), (2, 9, 4), 2),
        (lambda: nn.Linear(3, 4), (2, 4), 1),
        (lambda: nn.LSTM(3, 4), (2, 9, 4), 2),
        (lambda: nn.TransformerEncoderLayer(4, 1, 8), (2, 9, 4), 2),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (2, 9, 9, 4), 3),  # Swin
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 7), nn.Linear(4, 16), nn.Linear(16, 4)), (2, 4, 9, 9), 1),  # ConvNeXt
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 4)), (2, 9, 4), 2),  # Conformer
        (lambda: nn.Conv2d(3, 4, 16, 16), (2, 81, 4), 2),  # patches, made a sequence
    ],
    ids=["conv1d", "conv2d", "frames", "vectors", "lstm", "transformer", "swin", "convnext", "conformer", "patches"],
)
def test_where_the_channels_are(make, shape, axis):
    assert channel_axis(make(), torch.empty(shape)) == axis


def test_short_names():
    adaptations = [ctl.adapt(net(), net(7), [{"kind": kind}], example=X) for kind in ("delta", "ldifs")]
    assert adaptations[0].origin.strategies == (ctl.FeatureConservation(attention=True),)
    assert adaptations[1].origin.strategies == (ctl.FeatureConservation(metric="ldifs"),)
