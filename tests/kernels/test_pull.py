"""The pull on tensors: exact, in few passes, on whatever memory it meets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conservtl.kernels import chunks as module
from conservtl.kernels.dtensor import place_like
from conservtl.kernels.low_rank import dense_change, squared_change
from conservtl.kernels.pull import Pulled, gather

GROUPS = {rate: {"lr": rate} for rate in (0.1, 0.2)}


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def pulled(
    shape,
    *,
    strength=0.5,
    anchored=True,
    weighed=False,
    held=None,
    gradient=True,
    rate=0.1,
    seed=0,
    dtype=torch.float32,
):
    w, w0, g, importance = tensors(shape, shape, shape, shape, seed=seed, dtype=dtype)
    parameter = nn.Parameter(w)
    parameter.grad = g if gradient else None
    weights = importance.abs() if anchored and weighed else None
    return Pulled(parameter, w0.to(held or dtype) if anchored else None, strength, GROUPS[rate], weights)


def couple(items, scale=None, sign=1.0):
    for pull in gather(items):
        pull.add_gradients(sign, scale)


def move(items, skip=None):
    for pull in gather(items):
        pull.move_weights(1.0, skip)


def pull_of(item):
    """The plain gradient of strength / 2 sum importance (w - w0)^2, in the parameter's type."""
    anchor = torch.zeros_like(item.parameter) if item.anchor is None else item.anchor.to(item.parameter.dtype)
    importance = torch.ones_like(item.parameter) if item.importance is None else item.importance
    return (item.strength * importance * (item.parameter - anchor)).detach()


def expected_gradient(item, sign=1.0, scale=1.0):
    gradient = item.parameter.grad if item.parameter.grad is not None else torch.zeros_like(item.parameter)
    return gradient + sign * scale * pull_of(item)


ITEMS = st.builds(
    pulled,
    st.sampled_from([(3,), (2, 2), (7, 3), (40,), (5, 4, 3), ()]),
    strength=st.sampled_from([0.5, 2.0]),
    anchored=st.booleans(),
    weighed=st.booleans(),
    held=st.sampled_from([None, torch.bfloat16]),
    gradient=st.booleans(),
    rate=st.sampled_from([0.1, 0.2]),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


class TestGradients:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(ITEMS, max_size=6),
        st.booleans(),
        st.integers(1, 50),
        st.sampled_from([None, 1024.0]),
        st.sampled_from([1.0, -1.0]),
    )
    def test_formula_however_it_is_cut_into_chunks(self, items, elsewhere, chunk, scale, sign):
        """Through the CPU's buffer, and in shared launches as elsewhere."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module._CHUNK, "cpu", chunk)
            if elsewhere:
                patch.delitem(module._CHUNK, "cpu")
                patch.setattr(module, "_CHUNK_ELSEWHERE", chunk)
            expected = [expected_gradient(item, sign, scale or 1.0) for item in items]
            couple(items, None if scale is None else torch.tensor(scale), sign)
        for item, gradient in zip(items, expected, strict=True):
            torch.testing.assert_close(item.parameter.grad, gradient, rtol=1e-5, atol=1e-5 * (scale or 1.0))

    @pytest.mark.parametrize("scale", [None, 65536.0])
    def test_a_tensor_larger_than_a_chunk(self, scale):
        item = pulled((module._CHUNK["cpu"] + 12_345,))
        expected = expected_gradient(item, scale=scale or 1.0)
        couple([item], None if scale is None else torch.tensor(scale))
        torch.testing.assert_close(item.parameter.grad, expected)

    @pytest.mark.parametrize("chunk", [10, 1000])
    @pytest.mark.parametrize("others", ["w", "w0", "g", "w g", "w w0", "w w0 g"], ids=str)
    def test_memory_that_is_not_contiguous(self, monkeypatch, chunk, others):
        """In large tensors and small ones; whichever of the three lies otherwise than the others."""
        monkeypatch.setitem(module._CHUNK, "cpu", chunk)
        item = pulled((4, 3, 5, 5))
        for which in others.split():
            tensor = {"w": item.parameter, "w0": item.anchor, "g": item.parameter.grad}[which]
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
        expected = expected_gradient(item)
        couple([item])
        torch.testing.assert_close(item.parameter.grad, expected)

    def test_made_once_for_many_steps(self, monkeypatch):
        """Gradients are other tensors at each step, or there are none; weights move in place."""
        monkeypatch.setitem(module._CHUNK, "cpu", 10)
        items = [pulled((4, 3, 2)), pulled((3,)), pulled((3, 2), anchored=False)]
        pulls = gather(items)
        for number in range(3):
            for item, gradient in zip(items, tensors((4, 3, 2), (3,), (3, 2), seed=number), strict=True):
                item.parameter.data.add_(gradient)
                item.parameter.grad = gradient if number else None
            expected = [expected_gradient(item) for item in items]
            for pull in pulls:
                pull.add_gradients()
            for item, gradient in zip(items, expected, strict=True):
                torch.testing.assert_close(item.parameter.grad, gradient)

    def test_gradients_that_are_sparse(self):
        item = pulled((5, 3))
        dense = torch.zeros(5, 3).index_copy_(0, torch.tensor([1, 3]), torch.ones(2, 3))
        item.parameter.grad = dense.to_sparse(1)
        couple([item])
        torch.testing.assert_close(
            item.parameter.grad, (dense + item.strength * (item.parameter - item.anchor)).detach()
        )

    def test_at_strength_zero_nothing_is_done(self):
        """What has been annealed away costs nothing and makes no gradients."""
        item = pulled((3,), gradient=False)
        for pull in gather([item]):
            pull.add_gradients(0.0)
            pull.move_weights(0.0)
        assert item.parameter.grad is None

    def test_does_not_cancel(self):
        """alpha w and -alpha w0 in two additions have a relative error of 1.7e-5 where w is near w0."""
        (w0,) = tensors((10_000,))
        w = w0 + 1e-3 * tensors((10_000,), seed=1)[0]
        parameter = nn.Parameter(w.clone())
        couple([Pulled(parameter, w0, 0.1)])
        exact = 0.1 * (w.double() - w0.double())
        assert (parameter.grad.double() - exact).norm() / exact.norm() < 1e-7

    def test_anchors_are_left_alone(self):
        item = pulled((30,))
        anchor, weight = item.anchor.clone(), item.parameter.detach().clone()
        couple([item])
        assert torch.equal(item.anchor, anchor)
        assert torch.equal(item.parameter, weight)


class TestWeights:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(ITEMS, max_size=6), st.sampled_from([None, 0.0, 1.0, 2.0]), st.booleans(), st.sampled_from([10, 99])
    )
    def test_formula_and_nothing_where_the_step_is_skipped(self, items, skip, tensor_rate, chunk):
        """Bit for bit nothing; found_inf may be a sum over devices."""
        if tensor_rate:
            items = [replace(i, group={"lr": torch.tensor(i.group["lr"])}) for i in items]
        start = [item.parameter.detach().clone() for item in items]
        gradients = [None if i.parameter.grad is None else i.parameter.grad.clone() for i in items]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module._CHUNK, "cpu", chunk)
            move(items, None if skip is None else torch.tensor([skip]))
        for item, before, gradient in zip(items, start, gradients, strict=True):
            anchor = item.anchor if item.anchor is not None else torch.zeros_like(before)
            if skip:
                assert torch.equal(item.parameter, before)
            else:
                share = float(item.group["lr"]) * item.strength * (1 if item.importance is None else item.importance)
                moved = before + torch.as_tensor(share).clamp(max=1) * (anchor.to(before.dtype) - before)
                torch.testing.assert_close(item.parameter.detach(), moved, rtol=1e-5, atol=1e-6)
            assert item.parameter.grad is None or torch.equal(item.parameter.grad, gradient)

    def test_an_importance_never_carries_a_weight_beyond_the_source(self):
        item = replace(pulled((3,), weighed=True), strength=1e6)
        move([item])
        torch.testing.assert_close(item.parameter.detach(), item.anchor)


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("importance", "coupled", "decoupled"),
    [(None, 1.5, 1 - 0.875**3), (2.0, 3.0, 1 - 0.75**3), (100.0, 150.0, 1.0)],
    ids=["plain", "weighed", "beyond the source"],
)
def test_one_pull_for_many_steps(importance, coupled, decoupled, rate):
    """Three times the gradient; of the way, a share of 1 - (1 - rate × strength)^3."""
    parameter = nn.Parameter(torch.tensor([2.0]))
    weight = None if importance is None else torch.tensor([importance])
    (pull,) = gather([Pulled(parameter, torch.tensor([1.0]), 0.5, {"lr": rate}, weight, 3)])
    pull.add_gradients()
    assert parameter.grad.item() == pytest.approx(coupled)
    pull.move_weights()
    assert parameter.item() == pytest.approx(2 - decoupled)


@pytest.mark.parametrize(
    "other",
    [{"strength": 0.25}, {"group": {"lr": 0.1}}, {"every": 2}, {"anchor": None}, {"importance": torch.ones(3)}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_pulled_together(other):
    item = pulled((3,))
    assert len(gather([item, pulled((2, 2))])) == 1
    assert len(gather([item, replace(item, **other)])) == 2
    assert len(gather([item, pulled((3,), dtype=torch.float64)])) == 2


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_changes_of_low_rank(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=dtype) for size in ((2, 3, 5), shape))
    change = 0.5 * torch.einsum("or,rij->oij", b.flatten(1), a)
    torch.testing.assert_close(dense_change(a, b, 0.5), change)
    if dtype == torch.float64:
        torch.testing.assert_close(squared_change(a, b, 0.5), change.square().sum())
        with torch.autocast("cpu", torch.bfloat16):  # in the caller's loss
            found = squared_change(a.float(), b.float(), 0.5)
        torch.testing.assert_close(found.double(), change.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_anchors_are_laid_out_as_their_parameters(dtype):
    """Else a kernel for many tensors falls back to one launch for each."""
    parameter = nn.Parameter(tensors((4, 3, 5, 5))[0].to(memory_format=torch.channels_last))
    (start,) = tensors((4, 3, 5, 5), seed=1)
    placed = place_like(start, parameter, dtype)
    assert placed.stride() == parameter.stride()
    assert not placed.requires_grad
    assert torch.equal(placed, start.to(dtype or torch.float32))
