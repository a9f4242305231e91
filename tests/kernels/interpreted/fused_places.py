"""Places in memory and in tables that 32 bits cannot count, and gradients of another type: run by ``test_fused.py``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conservtl.kernels import philox
from conservtl.kernels.fused import launch, members
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.row_blocks import RowBlocks
from conservtl.kernels.pull import Pulled, gather

FAR = 2**36
"""Elements: their numbers take 37 bits, and the numbers of counters, of four words each, 35."""
SHAPES = [(70, 2), (3,), (5, 40)]
AMOUNTS = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64), 0.5


def made(by):
    """Tensors whose tables say that each begins ``by`` elements earlier, and each block as many later."""
    generator = torch.Generator().manual_seed(0)
    w, w0, f, g = ([torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4))
    for weight, gradient in zip(w, g, strict=True):
        weight.grad = gradient
    of = Members(w, w0, [one.abs() for one in f])
    for table in (of.weight_table, of.anchor_table, of.importance_table):
        table.sub_(4 * by)
    for blocks in (of.blocks, of.spans, of.drawn):
        blocks.starts += by
        blocks.sizes += by
    gradients = of.gradients
    of.gradients = lambda **how: (gradients(**how)[0] - 4 * by, gradients(**how)[1])
    return of


WORK = {
    "pull": lambda of: launch.add_pull(of, AMOUNTS, torch.tensor(2.0)),
    "lerp": lambda of: launch.lerp(of, AMOUNTS, None, 3),
    "soften": lambda of: launch.soften(of, AMOUNTS, None),
    "moves": lambda of: launch.sums(of, "move, gradient"),
    "gradients": lambda of: launch.sums(of, "weight, gradient", "roots"),
}


@pytest.mark.parametrize("name", WORK)
def test_elements_beyond_32_bits(name):
    near, far = made(0), made(FAR)
    one, other = WORK[name](near), WORK[name](far)
    assert (one is None and other is None) or torch.equal(one, other)
    for ours, theirs in zip(near.owners, far.owners, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("shrunk", [True, False])
def test_rows_beyond_32_bits(shrunk):
    """Rows of 2 and of 40 elements, in classes of their own."""
    results = []
    for by in (0, FAR):
        of = made(0)
        blocks = RowBlocks(of)
        lengths = torch.tensor([2, 1, 40])
        of.weight_table -= 4 * by * lengths
        of.anchor_table -= 4 * by * lengths
        for one, _ in blocks._blocks:
            one.starts += by
            one.sizes += by
        blocks._bases.sub_(by)
        results.append([blocks.largest()])
        if shrunk:
            blocks.shrink(AMOUNTS, None)
        else:
            blocks.into_balls(AMOUNTS, absolute=True, relative=True)
        results[-1] += of.weights
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_masks_of_elements_beyond_32_bits(monkeypatch):
    """The words of those counters, whose upper half is no longer zero."""
    of, identities, dropped = made(FAR), torch.tensor([5, 6, 7]), 30_000
    before = [(weight.clone(), weight.grad.clone()) for weight in of.owners]
    plains = [torch.empty_like(weight) for weight in of.weights]
    table = torch.tensor([plain.data_ptr() - 4 * FAR for plain in plains])
    launch.mix(of, identities, table, 3, 9, dropped)
    mixed = [weight.clone() for weight in of.weights]
    launch.unmix(of, identities, table, None, 3, 9, dropped)
    count = torch.arange
    monkeypatch.setattr(philox.torch, "arange", lambda end, device=None: count(end, device=device) + FAR // 4)
    scale = 65536 / (65536 - dropped)
    for at, (weight, gradient) in enumerate(before):
        words = philox.words(weight.numel(), 3, 9, int(identities[at]))
        mask = (words >> 16 >= dropped).view(weight.shape) * scale
        torch.testing.assert_close(mixed[at], of.anchors[at] + mask * (weight - of.anchors[at]))
        torch.testing.assert_close(of.owners[at].grad, mask * gradient)
        assert torch.equal(of.weights[at], weight)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs gradients of another type")
@pytest.mark.parametrize("missing", [False, True])
def test_gradients_of_another_type_are_left_to_torch(missing):
    """A program would read beyond their memory."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert members.fits(parameter)
    parameter.grad_dtype = torch.bfloat16
    assert not members.fits(parameter)
    parameter.grad = None if missing else torch.ones(2, dtype=torch.bfloat16)
    for kernel in gather([Pulled(parameter, torch.zeros(2), 0.5)]):
        kernel.add_gradients()
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.tolist() == ([0.5, 1.0] if missing else [1.5, 2.0])
