"""What updates do to all their parameters at once, against the same updates by torch: run by ``test_fused.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conservtl.kernels import backend
from conservtl.kernels.fused import row_blocks
from conservtl.kernels.philox import identity, words
from conservtl.methods._pulls import Proximal
from conservtl.methods.auto_rgn import AutoRGNUpdate
from conservtl.methods.mixout import MixoutUpdate
from conservtl.methods.projection import ProjectionUpdate
from conservtl.methods.selective_decay import SelectiveDecayUpdate
from conservtl.plan.update import Moving, Prepared, Step

SHAPES = [(), (1,), (5,), (0, 4), (2, 2), (1, 300), (5, 4, 3), (4, 3, 3, 3), (70, 2), (3, 130), (2, 17, 5)]


class Row:
    def __init__(self, name):
        self.name, self.new_rows = name, ()


def moved(shapes, dtype, seed=0, *, held=None, missing=False, spread=0.3, last=False):
    """Parameters at some distance of their anchors, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number, shape in enumerate(shapes):
        w0, d, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        if last and len(shape) == 4:
            w0, d, g = (t.to(memory_format=torch.channels_last) for t in (w0, d, g))
        w0 = w0.to(held or dtype)
        parameter = nn.Parameter((w0.double() + spread * d).to(dtype))
        parameter.grad = None if missing and number % 2 else g.to(dtype)
        items.append(
            Moving(Row(f"p{number}"), parameter, w0, {"lr": 0.1 + number % 3 / 10, "layer": f"l{number // 2}"})
        )
    return items


UPDATES = [
    ProjectionUpdate(by="x", names=(), radius=0.2, relative=True),
    ProjectionUpdate(by="x", names=(), radius=0.5),
    ProjectionUpdate(by="x", names=(), radius=0.2, relative=True, each="row"),
    ProjectionUpdate(by="x", names=(), radius=0.4, each="row", norm="mars"),
    ProjectionUpdate(by="x", names=(), radius=0.2, relative=True, norm="mars"),
    ProjectionUpdate(by="x", names=(), radius=0.0),
    Proximal(by="x", names=(), alpha=0.5, penalty="l1"),
    Proximal(by="x", names=(), alpha=0.5, penalty="group_lasso"),
    SelectiveDecayUpdate(by="x", names=(), strength=1.5),
    AutoRGNUpdate(by="x", names=(), every=3),
]


def act(update, moving, *, skip=None, scale=None):
    """One step of an update around a step of SGD that goes further away."""
    state = {}
    groups = {id(item.group): item.group for item in moving}
    with torch.no_grad():
        update.gradients(Step(moving, 0, skip, scale), state)
        update.before(Step(moving, 1, skip, scale), state)
        for item in moving:
            if item.parameter.grad is not None:
                item.parameter.add_(item.parameter.grad, alpha=0.1)
        update.after(Step(moving, 0, skip), state)
    assert all("own_lr" not in group for group in groups.values())
    return [item.parameter.detach() for item in moving], state


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(UPDATES),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.0, 1.0]),
    st.sampled_from([None, 512.0]),
)
def test_as_torch_does_it(update, shapes, dtype, held, missing, last, skip, scale):
    """All of them, in any stack of shapes."""
    how = {"held": held, "missing": missing, "last": last}
    skip = None if skip is None else torch.tensor([skip], dtype=dtype)  # torch takes the rate's type from it
    scale = None if scale is None else torch.tensor(scale)
    expected, their_state = act(update, moved(shapes, dtype, **how), skip=skip, scale=scale)
    found, state = act(update, Prepared(moved(shapes, dtype, **how)), skip=skip, scale=scale)
    digits = torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=32 * digits, atol=64 * digits)
    assert state.keys() == their_state.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, their_state[key], rtol=32 * digits, atol=64 * digits)


@pytest.mark.parametrize("update", UPDATES[:8], ids=str)
def test_nan_is_never_hidden(update):
    """A weight that is NaN must not become the source's."""
    moving = Prepared(moved([(3, 4), (40, 2)], torch.float32))
    with torch.no_grad():
        moving[0].parameter[1, 2] = torch.nan
        update.after(Step(moving, 0), {})
    assert moving[0].parameter[1, 2].isnan()
    assert moving[1].parameter.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_half_precision_is_rounded_once(update, dtype):
    """Sums and shares are of single precision: as in double, but for the rounding of weights before and after."""
    halves, exact = Prepared(moved(SHAPES[::3], dtype)), moved(SHAPES[::3], dtype)
    for number, item in enumerate(exact):
        parameter = nn.Parameter(item.parameter.detach().double())
        parameter.grad = item.parameter.grad.double()
        exact[number] = replace(item, parameter=parameter, anchor=item.anchor.double())
    digits = torch.finfo(dtype).eps
    for one, other in zip(act(update, halves)[0], act(update, exact)[0], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4 * digits, atol=4 * digits)


def test_inside_the_ball_every_bit_is_kept():
    for update in (
        ProjectionUpdate(by="x", names=(), radius=1e9),
        ProjectionUpdate(by="x", names=(), radius=1e9, each="row"),
    ):
        moving = Prepared(moved([(3, 4), (50, 20)], torch.float32))
        before = [item.parameter.detach().clone() for item in moving]
        with torch.no_grad():
            update.after(Step(moving, 0), {})
        assert all(torch.equal(item.parameter, one) for item, one in zip(moving, before, strict=True))


@pytest.mark.parametrize("number", [2, 3, 4, 7])
def test_rows_that_one_program_cannot_go_through(number, monkeypatch):
    """They are summed in parts, as tensors of their own; the others stay together."""
    monkeypatch.setattr(row_blocks, "LONGEST", 16)
    monkeypatch.setattr(row_blocks, "_SHAPES", ((4, 4), (16, 1)))
    monkeypatch.setattr("conservtl.kernels.fused.moves.LONGEST", 16)
    shapes = [(3, 50), (5, 3), (2, 16), (1, 70)]
    expected, _ = act(UPDATES[number], moved(shapes, torch.float64))
    found, _ = act(UPDATES[number], Prepared(moved(shapes, torch.float64)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sums_over_several_programs(monkeypatch):
    shapes = [(40, 1000), (3,)]
    moving = Prepared(moved(shapes, torch.float32))
    moves, rest = backend.split(moving)
    assert not rest
    squares, starts = moves.sums("move, start")
    for at, item in enumerate(moving):
        exact = (item.parameter.detach().double() - item.anchor.double()).square().sum()
        torch.testing.assert_close(squares[at].double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(starts[at].double(), item.anchor.double().square().sum(), rtol=1e-6, atol=0)


MIXOUT = MixoutUpdate(by="x", names=(), p=0.4, seed=7)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([*SHAPES, (3000,)]), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_masks_are_those_of_the_counter(shapes, dtype, missing, number):
    """Weights, gradients and restored weights, by a Philox written in torch."""
    moving = Prepared(moved(shapes, dtype, missing=missing))
    dropped = round(0.4 * 65536)
    before = [item.parameter.detach().clone() for item in moving]
    slopes = [None if item.parameter.grad is None else item.parameter.grad.clone() for item in moving]
    masks = [
        (words(w.numel(), 7, number, identity(item.name)) >> 16 >= dropped).view(w.shape) * (65536 / (65536 - dropped))
        for item, w in zip(moving, before, strict=True)
    ]
    state = {}
    with torch.no_grad():
        MIXOUT.prepare(Step(moving, number), state, training=True)
        for item, w, mask in zip(moving, before, masks, strict=True):
            torch.testing.assert_close(item.parameter.detach(), item.anchor + mask.to(dtype) * (w - item.anchor))
        MIXOUT.prepare(Step(moving, number), state, training=True)  # a second batch of the step
        MIXOUT.gradients(Step(moving, number), state)
    assert not state
    for item, w, slope, mask in zip(moving, before, slopes, masks, strict=True):
        assert torch.equal(item.parameter, w)
        if slope is not None:
            torch.testing.assert_close(item.parameter.grad, mask.to(dtype) * slope)


def test_a_step_that_began_on_the_other_backend_goes_on():
    """Masks of the CPU's generator and masks by counter both serve the gradients of the other."""
    for first, second in ((Prepared, list), (list, Prepared)):
        moving, other, state = moved([(4, 5), (3,)], torch.float64), moved([(4, 5), (3,)], torch.float64), {}
        with torch.no_grad():
            MIXOUT.prepare(Step(first(moving), 5), state, training=True)
            mixed = [
                (item.parameter - item.anchor) / (moved_.parameter - item.anchor)
                for item, moved_ in zip(moving, other, strict=True)
            ]
            slopes = [item.parameter.grad.clone() for item in moving]
            MIXOUT.gradients(Step(second(moving), 5), state)
        for item, factor, slope in zip(moving, mixed, slopes, strict=True):
            torch.testing.assert_close(item.parameter.grad, factor * slope)


@pytest.mark.parametrize("number", [0, 4, 8])
def test_types_that_differ_keep_their_order(number):
    """Sums and shares of a parameter stay its own when each type has a launch of its own."""
    kinds = [((3, 4), torch.float32), ((5,), torch.float64), ((2, 2), torch.float32), ((4, 70), torch.float64)]

    def made():
        return [moved([shape], dtype, seed)[0] for seed, (shape, dtype) in enumerate(kinds)]

    found, _ = act(UPDATES[number], Prepared(made()))
    for one, item in zip(found, made(), strict=True):
        (alone,), _ = act(UPDATES[number], [item])
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)
