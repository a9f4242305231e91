"""Passes that taps remember, and combinations of modes that they know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conservtl.runtime.tap_hooks import Passes, Start
from conservtl.runtime.taps import Taps


def test_as_many_passes_as_make_a_batch_are_kept():
    """Four until the first loss; then as many as it was of."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    taps = Taps(model, {"0": "0"})
    inputs = [torch.full((1, 2), float(number)) for number in range(6)]
    for one in inputs:
        model(one)
    (tap,) = taps._taps.values()
    assert [record.number for record in tap.records] == [3, 4, 5, 6]
    taken = taps.take(2)
    assert list(taken.features) == ["0", "0 [2]"]
    torch.testing.assert_close(taken.features["0 [2]"], model[0](inputs[5]))
    for one in inputs[:3]:
        model(one)
    assert [record.number for record in tap.records] == [2, 3]


def test_modes_beyond_the_sixteenth_are_not_told_apart():
    model = nn.Sequential(*(nn.Dropout() for _ in range(5)))
    passes = Passes()
    start = Start(model, passes, [])
    seen = []
    for number in [*range(18), 15, 0]:
        for place, module in enumerate(model):
            module.train(bool(number >> place & 1))
        start(model)
        seen.append(passes.modes)
    assert seen == [*range(16), -1, -1, 15, 0]
    assert (passes.count, passes.running) == (20, True)


@pytest.mark.parametrize("live", [True, False])
def test_a_pass_without_gradients_is_none(live):
    passes = Passes()
    start = Start(nn.Linear(2, 2), passes, [])
    start.live = live
    with torch.set_grad_enabled(not live):
        start(nn.Linear(2, 2))
    assert (passes.count, passes.running) == (0, False)
