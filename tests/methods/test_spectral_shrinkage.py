"""Batch spectral shrinkage against a full decomposition in float64, and where a matrix is degenerate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.spectral_shrinkage import smallest_directions, smallest_squares

X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Net(nn.Module):
    """The head is not what comes right after a layer: something writes into what it is given."""

    def __init__(self, classes=3):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
        self.relu = nn.LeakyReLU(inplace=True)
        self.head = nn.Linear(4, classes)

    def body(self, x):
        return self.relu(self.second(self.first(x).tanh()))

    def forward(self, x):
        return self.head(self.body(x))


def adapted(*strategies, classes=3):
    torch.manual_seed(0)
    return ctl.adapt(Net(classes).double(), Net().double(), strategies)


def plain(features, k):
    """The last k of a full decomposition, from largest to smallest."""
    values = torch.linalg.svd(features.flatten(1), full_matrices=False).S
    return values.sort().values[:k].square().sum()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("classes", [3, 2])
def test_value_and_gradient_are_the_formula(k, classes):
    """Of what the head is given, also where the target has labels of its own; the source is not even kept."""
    adaptation = adapted(ctl.SpectralShrinkage(eta=0.3, k=k), classes=classes)
    assert adaptation.origin.source_model is None
    twin = copy.deepcopy(adaptation.model)
    y = Y.clamp(max=classes - 1)
    expected = F.cross_entropy(twin(X), y) + 0.3 * plain(twin.body(X), k)
    outputs = adaptation.model(X)
    found = adaptation.loss(F.cross_entropy(outputs, y), outputs)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for p, q in zip(adaptation.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_of_a_layer():
    adaptation = adapted(ctl.SpectralShrinkage(eta=0.3, layer="fir*"))
    outputs = adaptation.model(X)
    loss = F.cross_entropy(outputs, Y)
    torch.testing.assert_close(adaptation.loss(loss, outputs) - loss, 0.3 * plain(adaptation.model.first(X), 1))


def test_together_with_the_sources_own_head():
    """Two terms that both want the head's input: it is taken once."""
    adaptation = adapted(ctl.SpectralShrinkage(eta=0.3), ctl.OutputConservation(weight=0.5), classes=2)
    model, y = adaptation.model, Y.clamp(max=1)
    outputs = model(X)
    loss = F.cross_entropy(outputs, y)
    only = adapted(ctl.OutputConservation(weight=0.5), classes=2)
    other = only.model(X)
    conserved = only.loss(F.cross_entropy(other, y), other, X)
    torch.testing.assert_close(adaptation.loss(loss, outputs, X), conserved + 0.3 * plain(model.body(X), 1))


@pytest.mark.parametrize("shape", [(8, 3), (2, 5), (1, 4), (6, 2, 3)])
def test_a_batch_of_fewer_than_k(shape):
    """All of its singular values are shrunk."""
    features = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(smallest_squares(features, 99), features.square().sum())


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(4, 3),
        torch.ones(4, 3),
        torch.eye(4)[:, :3] * 2,  # all alike
        torch.randn(4, 1).expand(4, 3).contiguous(),
        torch.cat([torch.eye(3), torch.eye(3)]),
    ],
    ids=["zeros", "rank one", "equal values", "equal columns", "twice"],
)
def test_a_degenerate_matrix_has_a_finite_gradient(features):
    features = features.clone().requires_grad_()
    value = smallest_squares(features, 2)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()


def test_in_float32_whatever_the_autocast():
    """A decomposition in half precision does not exist, and its squares would be lost."""
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = (features @ torch.eye(4)).requires_grad_()
        assert half.dtype is torch.bfloat16
        found = smallest_squares(half, 1)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, plain(half.float(), 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_gives_nan(bad):
    """So that the run says where it diverged, or a scaler skips the step; the decomposition itself would raise."""
    features = torch.randn(4, 3)
    features[1, 1] = bad
    assert smallest_squares(features, 1).isnan()


def test_fields_and_names():
    with pytest.raises(ctl.SelectorError, match=r"'frist': must match at least one layer.*Did you mean 'first'"):
        adapted(ctl.SpectralShrinkage(layer="frist"))
    with pytest.raises(ctl.SpecError, match=r"'\*' matches \['first', 'second', 'head'\]"):
        adapted(ctl.SpectralShrinkage(layer="*"))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ctl.SpectralShrinkage(k=0)
    assert adapted({"kind": "bss"}).origin.strategies == (ctl.SpectralShrinkage(),)


@pytest.mark.parametrize("shape", [(64, 512), (512, 64), (16, 16)])
@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-5])
def test_the_gram_matrix_loses_no_digits_of_small_values(shape, least):
    """Squares of the smallest singular values of float32 features, against those in float64; and their gradient.

    Their error is below what single precision has without the square, and 2^-52 of the largest square.
    """
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spread = torch.logspace(2, torch.tensor(least).log10().item(), min(shape), dtype=torch.float64)
    features = (u * spread @ v).float().requires_grad_()
    exact = torch.linalg.svdvals(features.detach().double())[-3:].square().sum()
    value = smallest_squares(features, 3)
    assert value.dtype == torch.float32
    single = torch.linalg.svdvals(features.detach())[-3:].square().sum()
    assert (value - exact).abs() <= (single - exact).abs() + 1e-6 * exact
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=2**-52 * spread[0].item() ** 2)
    (slope,) = torch.autograd.grad(value, features)
    u, s, v = torch.linalg.svd(features.detach().double(), full_matrices=False)
    wanted = 2 * (u[:, -3:] * s[-3:]) @ v[-3:]
    assert (slope.double() - wanted).norm() / wanted.norm() < 1e-3


def _turned(values, width=9):
    """A matrix of given singular values."""
    generator = torch.Generator().manual_seed(0)
    turns = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in (6, width))
    left, right = turns
    return left @ torch.diag_embed(torch.tensor(values, dtype=torch.float64)) @ right[:6]


@pytest.mark.parametrize(
    "features",
    [
        torch.randn(12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        _turned([1.0, 1.0, 1.0 + 1e-12, 1.0 + 1e-5, 2.0, 3.0]),
        _turned([1e-6, 1e-3, 0.1, 1.0, 1.0, 30.0]),
        1e-12 * _turned([0.0, 0.0, 1.0, 1.0, 2.0, 3.0]),
        torch.zeros(6, 9, dtype=torch.float64),
    ],
    ids=["random", "tall", "clustered", "spread", "singular", "zero"],
)
@pytest.mark.parametrize("k", [1, 2, 4, 20])
def test_on_a_device_that_the_host_does_not_wait_for(features, k):
    """The sum along the smallest directions is that of the eigenvalues, and so is its gradient where it is unique."""
    waiting, moving = (features.clone().requires_grad_() for _ in range(2))
    expected, found = smallest_squares(waiting, k, waits=True), smallest_squares(moving, k, waits=False)
    largest = float(features.square().sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15 * largest)
    gaps = torch.linalg.svdvals(features).flip(0).square()
    if k >= len(gaps) or gaps[k] - gaps[k - 1] > 1e-6 * largest:
        expected.backward()
        found.backward()
        torch.testing.assert_close(moving.grad, waiting.grad, rtol=1e-6, atol=1e-9 * largest**0.5)


def test_the_smallest_directions_are_orthogonal():
    features = _turned([1.0, 1.0, 1.0, 1.0, 2.0, 3.0])
    directions = smallest_directions(features @ features.T, 4)
    torch.testing.assert_close(directions @ directions.T, torch.eye(4, dtype=torch.float64))
    assert smallest_squares(torch.full((3, 4), torch.nan), 1, waits=False).isnan()
