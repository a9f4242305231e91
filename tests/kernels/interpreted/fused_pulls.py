"""Triton's programs against float64 code, by its interpreter on the CPU: ``test_fused.py`` runs this in a process.

Shapes and strides are drawn: tensors of one element and of none, channels-last, transposed and sliced ones, gradients
laid out otherwise, missing or sparse.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conservtl.kernels import backend
from conservtl.kernels.fused import members, stream
from conservtl.kernels.fused.pull import FusedPull
from conservtl.kernels.pull import Pull, Pulled, gather

HALF = torch.bfloat16
SHAPES = [(), (1,), (3,), (0,), (0, 4), (2, 2), (40,), (5, 4, 3), (4, 3, 3, 3), (4, 2, 1, 1), (33, 9), (3000,)]


def laid_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps" and tensor.ndim:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "unaligned":
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
    return tensor.clone()


@st.composite
def pulls(draw):
    """A parameter to pull: its memory, its gradient's, and those of anchor and importance."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, HALF]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    w, w0, g, f = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    layouts = st.sampled_from(["plain", "channels_last", "transposed", "gaps", "unaligned"])
    layout = draw(layouts)
    parameter = nn.Parameter(laid_out(w, layout))
    kind = draw(st.sampled_from(["dense", "dense", "other layout", "missing", "sparse"]))
    if kind != "missing":
        parameter.grad = laid_out(g, draw(layouts) if kind == "other layout" else layout)
    if kind == "sparse" and w.numel() and w.ndim == 2 and dtype in (torch.float32, torch.float64):
        parameter.grad = parameter.grad.to_sparse(1)
    anchor = laid_out(w0, layout) if draw(st.booleans()) else None
    if anchor is not None and dtype == torch.float32 and draw(st.booleans()):
        anchor = laid_out(w0.to(HALF), layout)
    importance = laid_out(f.abs(), layout) if anchor is not None and draw(st.booleans()) else None
    rate = draw(st.sampled_from([0.1, 0.25]))
    group = {"lr": torch.tensor(rate) if draw(st.booleans()) else rate}
    return Pulled(
        parameter, anchor, draw(st.sampled_from([0.5, 2.0])), group, importance, draw(st.sampled_from([1, 3]))
    )


def differences(item):
    anchor = 0 if item.anchor is None else item.anchor.double()
    return item.parameter.detach().double() - anchor


def close(found, expected, dtype):
    """Within the rounding of one result."""
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(found.detach().double(), expected, rtol=4 * digits, atol=8 * digits)


def alike(items):
    """As a plan makes them: one number of steps for all."""
    return [replace(item, every=items[0].every) for item in items]


@settings(max_examples=25, deadline=None)
@given(st.lists(pulls(), min_size=1, max_size=5), st.sampled_from([None, 1024.0]), st.sampled_from([1.0, -1.0]))
def test_gradients(items, scale, sign):
    items = alike(items)
    expected = []
    for item in items:
        g = item.parameter.grad
        g = torch.zeros_like(item.parameter) if g is None else g.to_dense() if g.is_sparse else g
        f = 1 if item.importance is None else item.importance.double()
        expected.append(g.detach().double() + sign * (scale or 1) * item.every * item.strength * f * differences(item))
    for kernel in gather(items):
        kernel.add_gradients(sign, None if scale is None else torch.tensor(scale))
    for item, one in zip(items, expected, strict=True):
        if torch.finfo(item.parameter.dtype).max > one.abs().amax() if one.numel() else True:
            if isinstance(gather([item])[0], Pull):  # by torch, which rounds each operation
                continue
            close(item.parameter.grad / (scale or 1), one / (scale or 1), item.parameter.dtype)


@settings(max_examples=25, deadline=None)
@given(st.lists(pulls(), min_size=1, max_size=5), st.sampled_from([None, 0.0, 1.0, 2.0]))
def test_weights(items, skip):
    items = alike(items)
    before = [item.parameter.detach().clone() for item in items]
    expected = []
    for item in items:
        f = 1.0 if item.importance is None else item.importance.double()
        one = torch.as_tensor(float(item.group["lr"]) * item.strength * f, dtype=torch.float64)
        share = 1 - (1 - (one if item.importance is None else one.clamp(max=1))) ** item.every
        expected.append(item.parameter.detach().double() - share * differences(item))
    for kernel in gather(items):
        kernel.move_weights(1.0, None if skip is None else torch.tensor([skip]))
    for item, start, one in zip(items, before, expected, strict=True):
        if skip:
            assert torch.equal(item.parameter, start)
        elif not isinstance(gather([item])[0], Pull):
            close(item.parameter, one, torch.float32 if item.parameter.dtype == torch.float64 else item.parameter.dtype)


def test_one_launch_for_all_strengths_and_rates():
    """And another only for another type."""
    items = [Pulled(nn.Parameter(torch.ones(3, n)), torch.zeros(3, n), n / 10, {"lr": n / 10}) for n in range(1, 5)] + [
        Pulled(nn.Parameter(torch.ones(3).double()), torch.zeros(3).double(), 0.1, {"lr": 0.1})
    ]
    assert len(gather(items)) == 2
    for kernel in gather(items):
        kernel.move_weights()
    assert items[3].parameter[0, 0].item() == pytest.approx(1 - 0.4 * 0.4)
    assert items[4].parameter[0].item() == pytest.approx(1 - 0.01)


def test_tables_follow_gradients_that_are_other_tensors(monkeypatch):
    """At each step or now and then; addresses are sent only if they have changed."""
    item = Pulled(nn.Parameter(torch.ones(5)), torch.zeros(5), 0.5)
    (kernel,) = gather([item])
    held = [torch.zeros(5), torch.zeros(5)]
    for number in range(4):
        item.parameter.grad = held[number // 2]
        kernel.add_gradients()
    assert [gradient.tolist() for gradient in held] == [[1.0] * 5] * 2


def test_parameters_with_gaps_in_memory_are_left_to_torch():
    assert backend.fused_on(torch.device("cpu"))
    gaps = torch.ones(4, 6)[:, ::2]
    assert not members.fits(gaps)
    assert not members.fits(torch.ones(2, dtype=torch.complex64))
    assert members.fits(torch.ones(4, 6).T)
    assert not members.fits(torch.ones(4, 6).T, torch.ones(6, 4))
    assert members.fits(torch.ones(4, 2, 1, 1), torch.ones(4, 2, 1, 1).to(memory_format=torch.channels_last))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SHAPES), st.booleans()), min_size=1, max_size=5), st.booleans())
def test_anchors_that_are_sent_part_by_part(kinds, coupled):
    """As those that lie beside the parameters: tensors that share a part, and tensors of several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_PART", 128)
        patch.setattr(stream, "_RING", 2)
        results = []
        for streamed in (False, True):
            patch.setattr("conservtl.kernels.fused.pull.streams", lambda _, streamed=streamed: streamed)
            generator = torch.Generator().manual_seed(0)
            items = []
            for shape, last in kinds:
                w, w0, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
                parameter = nn.Parameter(laid_out(w, "channels_last" if last else "plain"))
                parameter.grad = laid_out(g, "channels_last" if last else "plain")
                anchor = w0 if streamed else laid_out(w0, "channels_last" if last else "plain")
                items.append(Pulled(parameter, anchor, 0.5 + len(items), {"lr": 0.1}))
            kernel = FusedPull(items)
            for _ in range(2):
                kernel.add_gradients(0.5) if coupled else kernel.move_weights(0.5)
            results.append([(item.parameter.detach(), item.parameter.grad) for item in items])
    for one, other in zip(*results, strict=True):
        assert all(map(torch.equal, one, other))
