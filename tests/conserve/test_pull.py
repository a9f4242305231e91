"""The pull on tensors: exact, in few passes, on whatever memory it meets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conservtl.conserve import pull as module
from conservtl.conserve.pull import Pulled, add_to_gradients, move_weights


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def pulled(shape, *, strength=0.5, anchored=True, gradient=True, rate=0.1, seed=0, dtype=torch.float32):
    w, w0, g = tensors(shape, shape, shape, seed=seed, dtype=dtype)
    parameter = nn.Parameter(w)
    parameter.grad = g if gradient else None
    return Pulled(parameter, w0 if anchored else None, strength, rate)


def expected_gradient(item, sign=1.0, scale=1.0):
    anchor = item.anchor if item.anchor is not None else torch.zeros_like(item.parameter)
    gradient = item.parameter.grad if item.parameter.grad is not None else torch.zeros_like(item.parameter)
    return (gradient + sign * scale * item.strength * (item.parameter - anchor)).detach()


ITEMS = st.builds(
    pulled,
    st.sampled_from([(3,), (2, 2), (7, 3), (40,), (5, 4, 3), ()]),
    strength=st.sampled_from([0.5, 2.0]),
    anchored=st.booleans(),
    gradient=st.booleans(),
    rate=st.sampled_from([0.1, 0.2]),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


class TestGradients:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(ITEMS, max_size=6), st.integers(1, 50), st.sampled_from([None, 1024.0]), st.sampled_from([1.0, -1.0])
    )
    def test_formula_however_it_is_cut_into_chunks(self, items, chunk, scale, sign):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CHUNK", chunk)
            expected = [expected_gradient(item, sign, scale or 1.0) for item in items]
            add_to_gradients(items, None if scale is None else torch.tensor(scale), sign)
        for item, gradient in zip(items, expected, strict=True):
            torch.testing.assert_close(item.parameter.grad, gradient, rtol=1e-5, atol=1e-5 * (scale or 1.0))

    @pytest.mark.parametrize("scale", [None, 65536.0])
    def test_a_tensor_larger_than_a_chunk(self, scale):
        item = pulled((module._CHUNK + 12_345,))
        expected = expected_gradient(item, scale=scale or 1.0)
        add_to_gradients([item], None if scale is None else torch.tensor(scale))
        torch.testing.assert_close(item.parameter.grad, expected)

    def test_memory_that_is_not_contiguous(self, monkeypatch):
        monkeypatch.setattr(module, "_CHUNK", 10)
        item = pulled((4, 3, 5, 5))
        item.parameter.data = item.parameter.data.to(memory_format=torch.channels_last)
        expected = expected_gradient(item)
        add_to_gradients([item])
        torch.testing.assert_close(item.parameter.grad, expected)

    def test_does_not_cancel(self):
        """alpha w and -alpha w0 in two additions have a relative error of 1.7e-5 where w is near w0."""
        (w0,) = tensors((10_000,))
        w = w0 + 1e-3 * tensors((10_000,), seed=1)[0]
        parameter = nn.Parameter(w.clone())
        add_to_gradients([Pulled(parameter, w0, 0.1)])
        exact = 0.1 * (w.double() - w0.double())
        assert (parameter.grad.double() - exact).norm() / exact.norm() < 1e-7

    def test_anchors_are_left_alone(self):
        item = pulled((30,))
        anchor, weight = item.anchor.clone(), item.parameter.detach().clone()
        add_to_gradients([item])
        assert torch.equal(item.anchor, anchor)
        assert torch.equal(item.parameter, weight)


class TestWeights:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(ITEMS, max_size=6), st.sampled_from([None, 0.0, 1.0, 2.0]), st.booleans())
    def test_formula_and_nothing_where_the_step_is_skipped(self, items, skip, tensor_rate):
        """Bit for bit nothing; found_inf may be a sum over devices."""
        if tensor_rate:
            items = [Pulled(i.parameter, i.anchor, i.strength, torch.tensor(i.rate)) for i in items]
        start = [item.parameter.detach().clone() for item in items]
        gradients = [None if i.parameter.grad is None else i.parameter.grad.clone() for i in items]
        move_weights(items, None if skip is None else torch.tensor([skip]))
        for item, before, gradient in zip(items, start, gradients, strict=True):
            anchor = item.anchor if item.anchor is not None else torch.zeros_like(before)
            if skip:
                assert torch.equal(item.parameter, before)
            else:
                moved = before + float(item.rate) * item.strength * (anchor - before)
                torch.testing.assert_close(item.parameter.detach(), moved, rtol=1e-5, atol=1e-6)
            assert item.parameter.grad is None or torch.equal(item.parameter.grad, gradient)
