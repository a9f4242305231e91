"""Where a pull is cut into chunks, and updates into runs; memory that tensors share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conservtl.kernels import chunks
from conservtl.kernels.chunks import Pulled, buffer_for, cut
from conservtl.kernels.deviation import runs
from conservtl.plan.update import Moving


@pytest.fixture(autouse=True)
def _chunks_of_ten(monkeypatch):
    monkeypatch.setitem(chunks._CHUNK, "cpu", 10)


def pulled(shape, **fields):
    weight = nn.Parameter(torch.zeros(shape))
    return Pulled(weight, **{"anchor": torch.zeros(shape), "strength": 0.1, **fields})


def sizes(items):
    return [[weight.numel() for weight in part.weights] for part in cut(items, None)]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ([4, 6, 1], [[4, 6], [1]]),
        ([4, 7, 3], [[4], [7, 3]]),
        ([10, 1], [[10], [1]]),
        ([0, 10, 0, 5], [[0, 10, 0], [5]]),
        ([11, 4, 25], [[10], [1], [10], [10], [5], [4]]),
        ([3, 12, 4], [[10], [2], [3, 4]]),
        ([], []),
    ],
)
def test_a_chunk_is_filled_to_its_last_element(given, parts):
    """A large tensor goes through by itself, and the small ones around it stay together."""
    assert sizes([pulled((size,)) for size in given]) == parts


def test_a_large_tensor_is_sliced_only_if_all_lie_alike():
    turned = torch.zeros(4, 3).T
    assert sizes([pulled((3, 4))]) == [[10], [2]]
    assert sizes([pulled((3, 4), anchor=None)]) == [[10], [2]]
    assert sizes([pulled((3, 4), anchor=turned)]) == [[12]]
    assert sizes([pulled((3, 4), importance=turned)]) == [[12]]
    assert sizes([pulled((3, 4), anchor=turned, importance=turned)]) == [[12]]


@pytest.mark.parametrize(
    ("given", "parts"),
    [([4, 6, 1], [[4, 6], [1]]), ([11, 4, 25], [[11], [4], [25]]), ([0, 10], [[0, 10]]), ([], [])],
)
def test_a_run_holds_as_much_as_a_chunk_and_one_tensor_in_any_case(given, parts):
    moving = [Moving(None, torch.zeros(size), None, {}) for size in given]
    assert [[item.parameter.numel() for item in run] for run in runs(moving)] == parts


def test_one_buffer_for_each_type_where_an_anchor_is_subtracted():
    buffers = {}
    first = buffer_for(pulled((3,)), buffers)
    assert buffer_for(pulled((20,)), buffers) is first
    assert (first.numel(), first.dtype) == (10, torch.float32)
    double = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert buffer_for(Pulled(double, double.detach(), 0.1), buffers).dtype == torch.float64
    assert buffer_for(pulled((3,), anchor=None), buffers) is None
    elsewhere = nn.Parameter(torch.zeros(3, device="meta"))
    assert buffer_for(Pulled(elsewhere, elsewhere.detach(), 0.1), buffers) is None
    assert set(buffers) == {torch.float32, torch.float64}


ROWS = [
    ((7,), (1,), True),
    ((), (), True),
    ((1, 5), (1, 1), True),
    ((3, 4), (4, 1), True),
    ((3, 4), (1, 3), False),
    ((2, 3, 2, 2), (12, 1, 6, 3), True),  # channels last
    ((0, 4), (4, 1), True),
]


@pytest.mark.parametrize(("shape", "strides", "rows"), ROWS)
def test_rows_that_follow_each_other_in_memory(shape, strides, rows):
    pytest.importorskip("triton")
    from conservtl.kernels.fused.members import in_rows

    assert in_rows(torch.zeros(shape).as_strided(shape, strides) if 0 not in shape else torch.zeros(shape)) == rows


@pytest.mark.parametrize(
    ("parameter", "others", "fit"),
    [
        (torch.zeros(3, 4), (), True),
        (torch.zeros(4, 3).T, (torch.zeros(4, 3).T,), True),
        (torch.zeros(4, 3).T, (torch.zeros(3, 4),), False),
        (torch.zeros(1, 4), (torch.zeros(4, 1).T,), True),  # a stride that nothing follows
        (torch.zeros(3, 4), (torch.zeros(3, 4), torch.zeros(4, 3).T), False),
        (torch.zeros(3, 4), (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)), True),
        (torch.zeros(3, 4), (torch.zeros(3, 4, dtype=torch.int32),), False),
        (torch.zeros(3, 4), (torch.zeros(4, 3),), False),
        (torch.zeros(3, 4), (torch.zeros(3, 4, device="meta"),), False),
        (torch.zeros(3, 4, dtype=torch.complex64), (), False),
        (torch.zeros(3, 8)[:, ::2], (), False),
        (torch.zeros(3, 8)[:, :4], (), False),
        (torch.zeros(0, 4), (), True),
    ],
)
def test_tensors_that_programs_can_act_on(parameter, others, fit):
    pytest.importorskip("triton")
    from conservtl.kernels.fused.members import fits

    assert fits(parameter, *others) == fit


@pytest.mark.parametrize(
    ("size", "block", "counts", "starts"),
    [([5, 0, 4], 4, [2, 0, 1], [0, 4, 0]), ([5, 8], [4, 8], [2, 1], [0, 4, 0]), ([4, 1], 4, [1, 1], [0, 0])],
)
def test_blocks_that_cover_tensors(size, block, counts, starts):
    from conservtl.kernels.fused.table import Blocks

    blocks = Blocks(size, block, torch.device("cpu"))
    assert (blocks.counts, blocks.count, blocks.starts.tolist()) == (counts, len(starts), starts)
    assert blocks.entries.tolist() == [entry for entry, count in enumerate(counts) for _ in range(count)]
    assert blocks.ends.tolist() == [sum(counts[:place]) for place in range(len(counts) + 1)]
    part = blocks.part(slice(1, None))
    assert (part.count, part.starts.tolist(), blocks.count) == (len(starts) - 1, starts[1:], len(starts))


def test_addresses_are_sent_if_they_changed():
    from conservtl.kernels.fused.table import Addresses

    addresses = Addresses(torch.device("cpu"))
    first = addresses.at([16, 0])
    assert (first.tolist(), addresses.aligned) == ([16, 0], True)
    assert addresses.at([16, 0]) is first
    assert addresses.at([16, 8]).tolist() == [16, 8]
    assert not addresses.aligned


@pytest.mark.parametrize("tensor", [True, False])
def test_rates_times_strengths(tensor):
    """One rate of all groups is a factor; rates that differ are in the table, which is made anew if one changes."""
    pytest.importorskip("triton")
    from conservtl.kernels.fused.rates import Rates

    groups = [{"lr": torch.tensor(rate)} if tensor else {"lr": rate} for rate in (0.5, 0.25)]
    rates = Rates([groups[0], groups[1], groups[0]], [1.0, 2.0, 4.0], torch.device("cpu"))
    assert [rates.groups[place] is groups[place] for place in (0, 1)] == [True, True]

    def found():
        table, factor = rates.times(2.0)
        return [one * factor for one in table.tolist()]

    assert found() == [1.0, 1.0, 4.0]
    groups[1]["lr"] = torch.tensor(1.0) if tensor else 1.0
    assert found() == [1.0, 4.0, 4.0]
    assert tensor or rates.times(2.0)[0] is rates.times(1.0)[0]
    groups[1]["lr"] = groups[0]["lr"]
    assert found() == [1.0, 2.0, 4.0]
    assert [one * rates.without(3.0)[1] for one in rates.without(3.0)[0].tolist()] == [3.0, 6.0, 12.0]
    assert Rates([None, None], [1.0, 2.0], torch.device("cpu")).groups == []


@pytest.mark.parametrize(
    ("change", "streamed"),
    [
        ({}, True),
        ({"anchor": None}, False),
        ({"importance": 1}, False),
        ({"anchor": SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)}, False),
        ({"anchor": SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)}, False),
        ({"parameter": SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)}, False),
        ({"parameter": SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, placements=())}, False),
    ],
)
def test_anchors_that_are_sent_part_by_part(change, streamed, monkeypatch):
    pytest.importorskip("triton")
    from conservtl.kernels.fused import stream

    monkeypatch.setattr(stream, "fits", lambda _: True)
    anchor, parameter = (SimpleNamespace(device=torch.device(one), dtype=torch.float32) for one in ("cpu", "cuda"))
    item = SimpleNamespace(**{"anchor": anchor, "parameter": parameter, "importance": None, **change})
    assert stream.streams(item) == streamed
    monkeypatch.setattr(stream, "fits", lambda _: False)
    assert not stream.streams(item)
