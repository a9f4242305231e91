"""Numbers of windows of convolutions and pooling over each length, as the modules have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conservtl.runtime.padding_watch import PaddingWatch, _arithmetic, _axes, _length


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(1, 1, 3),
        nn.Conv1d(1, 1, 4, stride=3, padding=2),
        nn.Conv1d(1, 1, 3, stride=2, padding=1, dilation=2),
        nn.Conv1d(1, 1, 3, stride=2, padding="valid"),
        nn.MaxPool1d(2),
        nn.MaxPool1d(3, stride=2, ceil_mode=True),
        nn.MaxPool1d(3, stride=2, dilation=2),
        nn.AvgPool1d(3, stride=2, padding=1),
        nn.AvgPool1d(2, ceil_mode=True),
    ],
    ids=str,
)
def test_windows_over_each_length(module):
    lengths = torch.arange(6, 20)
    expected = [module(torch.zeros(1, 1, int(length))).shape[-1] for length in lengths]
    assert _length(_arithmetic(module, 0), lengths).tolist() == expected


def test_every_axis_has_its_own():
    module = nn.Conv2d(1, 1, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 3))
    assert [_arithmetic(module, axis) for axis in (0, 1)] == [(3, 2, 0, 1, False), (5, 1, 2, 3, False)]
    kinds = (nn.Conv1d(1, 1, 1), nn.MaxPool1d(1), nn.AvgPool2d(1), nn.Conv2d(1, 1, 1), nn.MaxPool3d(1))
    assert list(map(_axes, kinds)) == [1, 1, 2, 2, 3]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.conv, self.pool = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, stride=2), nn.MaxPool1d(2)

    def forward(self, x, lengths=None):
        return self.pool(self.conv(self.same(x)))


def test_modules_that_change_the_number_of_positions_are_recorded_in_each_pass():
    """Only where arguments say what is padding, and hooks are there for one block."""
    model, lengths = Network(), torch.tensor([9, 5])
    with PaddingWatch(model) as watch:
        for size in (9, 12):
            model(torch.zeros(2, 1, size), lengths=lengths)
            after = (size - 1) // 2
            found = watch.padding.resamplings
            assert [one.sizes for one in found] == [((size, after),), ((after, after // 2),)]
            assert [one.lengths[0](lengths).tolist() for one in found] == [[4, 2], [4, 2]]
        model(torch.zeros(2, 1, 9))
        assert watch.padding is None
    model(torch.zeros(2, 1, 9), lengths)
    assert watch.padding is None
