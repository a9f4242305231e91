"""Programs compiled for a GPU as their launchers call them, by way of Triton's own code: no GPU is needed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from conservtl.kernels.fused import calls, launch, programs  # noqa: E402
from conservtl.kernels.fused.members import Members  # noqa: E402
from conservtl.kernels.fused.mixing import Mixing  # noqa: E402
from conservtl.kernels.fused.row_blocks import RowBlocks  # noqa: E402

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = [(40, 100), (3,), (2, 2064), (5, 7)]
VECTORIZED = {"add_pull", "lerp", "mix", "row_norms", "shrink_rows", "soften", "sums", "unmix"}


def tensors(dtype, *, aligned, shapes=SHAPES):
    """Return views of one piece of memory, at places that are multiples of 16 bytes or not."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.zeros(sum(size + 128 for size in sizes) + 128, dtype=dtype)
    begin = -memory.data_ptr() % 256 // memory.itemsize + (not aligned)
    found = []
    for shape, size in zip(shapes, sizes, strict=True):
        found.append(memory[begin : begin + size].view(shape))
        begin += -(-size // 64) * 64
    return found


def members(weights=FP32, anchors=FP32, importances=None, *, aligned=True, shapes=SHAPES):
    def make(dtype):
        return None if dtype is None else tensors(dtype, aligned=aligned, shapes=shapes)

    made = make(weights)
    for weight in made:
        weight.grad = torch.zeros_like(weight)
    return Members(made, make(anchors), make(importances))


def amounts(of):
    return torch.ones(len(of.weights), dtype=FP64), 0.1


def pulls(of):
    """Coupled and decoupled, with a loss scale, a skip, several steps in one, anchors in parts; by thresholds."""
    for scalar in (None, torch.ones((), dtype=FP32)):
        launch.add_pull(of, amounts(of), scalar)
        for every in (1, 3):
            launch.lerp(of, amounts(of), scalar, every)
        if of.anchored and of.importances is None:
            launch.soften(of, amounts(of), scalar)
    launch.add_pull(of, amounts(of), None, [(of.blocks, of.weight_table)])


def reductions(of):
    for terms in ("move, start", "move, start, absolute", "move, gradient", "weight, gradient"):
        for kind in ("sum", "roots", "root"):
            launch.sums(of, terms, kind)
    count = len(of.weights)
    vector = torch.ones(count, dtype=of.accumulate)
    launch.decay_shares(of, launch.span_sums(of, "move, start"), vector, vector, 0.1, -1)
    order = torch.arange(of.spans.count, dtype=torch.int32)
    launch.range_sums(launch.span_sums(of, "move, start"), of.spans.ends, "roots", order)
    norms = torch.ones((2, count), dtype=of.accumulate)
    for scale, before in itertools.product((None, torch.ones(())), (None, torch.ones(count + 1, dtype=of.accumulate))):
        launch.ratios(norms, scale, before)


def rows(of):
    blocks = RowBlocks(of)
    blocks.largest()
    for skip in (None, torch.ones(())):
        blocks.shrink(amounts(of), skip)
    for absolute, relative in itertools.product((True, False), repeat=2):
        blocks.into_balls(amounts(of), absolute=absolute, relative=relative)


def masks(of):
    for seed in (1, 5, 1 << 40):
        mixing = Mixing(of, [str(number) for number in range(len(of.weights))])
        mixing.mix(seed, 16, 1)
        for restored in (True, False):
            mixing.unmix([True] * len(of.weights), seed, 16, 1, restored=restored)


def launched(driver):
    return {one.source.fn.__name__ for one in driver.launches}


def test_every_program_reads_words_of_16_bytes(gpu):
    """Memory is the limit: loads of 4 bytes would double the instructions."""
    driver, of = gpu(90), members(shapes=SHAPES[:1])
    launch.add_pull(of, amounts(of), None)
    launch.lerp(of, amounts(of))
    launch.soften(of, amounts(of), None)
    even = members(shapes=[(8, 2064)])
    RowBlocks(even).largest()
    RowBlocks(even).shrink(amounts(even), None)
    mixing = Mixing(of, ["weight"])
    mixing.mix(1, 1, 1)
    mixing.unmix(None, 1, 1, 1, restored=False)
    launch.decay_shares(of, launch.span_sums(of, "move, start"), torch.ones(1), torch.ones(1), 0.1, 1)
    launch.ratios(torch.ones(2, 1), None, None)
    assert launched(driver) == set(programs.__all__)
    for one in driver.launches:
        name = one.source.fn.__name__
        text = next(iter(one.source.fn.device_caches[97][0].values())).asm["ptx"]
        assert ("ld.global.v4" in text) == (name in VECTORIZED), name


@pytest.mark.parametrize(("dtype", "arch"), [(BF16, 80), (FP64, 90)])
def test_pulls_of_other_types_compile(dtype, arch, gpu):
    driver, of = gpu(arch), members(dtype, BF16, FP32, aligned=False, shapes=SHAPES[:2])
    launch.add_pull(of, amounts(of), torch.ones(()))
    launch.lerp(of, amounts(of), torch.ones(()), 3)
    assert launched(driver) == {"add_pull", "lerp"}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "aligned"), [(80, True), (90, False)])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64])
def test_every_call_of_a_launcher_compiles(dtype, aligned, arch, gpu):
    """Types of weights, anchors and importances, places in memory, and one tensor, where counts are 1."""
    driver = gpu(arch)
    for anchors, importances in ((None, None), (dtype, None), (BF16, FP32), (FP32, dtype)):
        pulls(members(dtype, anchors, importances, aligned=aligned))
    for anchors, shapes in ((dtype, SHAPES), (BF16, SHAPES[1:2]), (FP32, [(8, 64), (16, 2064)])):
        of = members(dtype, anchors, aligned=aligned, shapes=shapes)
        for work in (pulls, reductions, rows, masks):
            work(of)
    assert launched(driver) == set(programs.__all__)


def test_a_second_launch_is_that_of_triton(gpu):
    """The same grid, stream and arguments, constants included, and none of the work of finding the program."""
    driver, of = gpu(90), members(shapes=SHAPES[:2])
    thresholds = amounts(of)
    launch.soften(of, thresholds, None)
    driver.stream = 77  # as while a graph is captured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(programs.soften), "run", None)
        launch.soften(of, thresholds, None)
    first, second = driver.launches
    assert (first.stream, second.stream) == (1234, 77)
    assert (second.source, second.grid) == (first.source, first.grid)
    assert second.arguments[7:] == first.arguments[7:]
    assert [one.data_ptr() for one in second.arguments[:7]] == [one.data_ptr() for one in first.arguments[:7]]


def test_a_launcher_of_other_arguments_leaves_the_launch_to_triton(gpu, monkeypatch):
    """As that of Triton before 3.3, which takes no constants: it is asked once."""
    driver, of = gpu(90), members(shapes=SHAPES[:2])
    launch.soften(of, amounts(of), None)
    asked = []

    def refuse(kernel, grid):
        asked.append(grid)
        raise TypeError("function takes exactly 22 arguments (28 given)")

    monkeypatch.setattr(triton.compiler.CompiledKernel, "__getitem__", refuse)
    for count in range(2, 5):
        launch.soften(of, amounts(of), None)
        assert len(driver.launches) == count
    assert asked == [(of.blocks.count, 1, 1)]


NUMBERS = [
    0,
    1,
    2,
    15,
    16,
    17,
    48,
    -1,
    -16,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**40,
    2**40 + 1,
    2**63,
    2**63 + 16,
]


def test_what_triton_tells_apart_is_told_apart(gpu):
    """Of arguments with one key Triton makes one program: else a program would be launched with wrong hints."""
    gpu(90)
    binder = programs.range_sums.device_caches[97][-1]
    program = {}
    for dtype, place, number in itertools.product((FP32, FP64, torch.int64), (64, 68, 72), [*NUMBERS, 1.0, 16.0, 0.1]):
        tensor = SimpleNamespace(dtype=dtype, data_ptr=lambda place=place: place)
        _, told, _ = binder(*[tensor] * 4, number, 3, "ACC", True, "sum", 256)
        key = dtype, place % 16 == 0, calls._kind(number)
        assert program.setdefault(key, told) == told


@pytest.mark.parametrize("which", range(3))
def test_words_are_read_only_if_all_tensors_begin_at_one(which):
    parts = [tensors(FP32, aligned=part != which, shapes=SHAPES) for part in range(3)]
    assert not Members(*parts).aligned
    assert Members(*(tensors(FP32, aligned=True, shapes=SHAPES) for _ in range(3))).aligned
