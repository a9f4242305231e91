"""Caches that are given up because what they would hold is no tensor with a row for each example."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conservtl.engine import frozen_prefix_cache, source_output_cache
from conservtl.engine.batching import as_batches
from conservtl.engine.draws import Draws
from conservtl.engine.frozen_prefix_cache import _alike, _features, _same
from conservtl.padding.positions import Padding

CPU = torch.device("cpu")
ROWS = torch.zeros(2, 3)


def part(outputs=ROWS, features=("a",), padding=None, passes=1):
    """What the source model gives for two examples."""
    given = dict.fromkeys(features, torch.zeros(2, 4))
    return SimpleNamespace(outputs=outputs, features=given, padding=padding, passes=passes)


KNOWN = Padding(torch.tensor([1, 2]), (4,))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([part(), part()], True),
        ([part(), part(features=("a", "b"))], False),
        ([part(), None], False),
        ([part(passes=2)], False),
        ([part(outputs="text")], False),
        ([part(outputs=torch.zeros(1, 3))], False),
        ([part(padding=KNOWN), part(padding=KNOWN)], True),
        ([part(padding=KNOWN), part()], False),
    ],
    ids=["alike", "other layers", "random", "two passes", "no logits", "fewer rows", "lengths", "lengths of some"],
)
def test_of_a_source_models_outputs(parts, kept, monkeypatch):
    """Two batches of two examples each."""
    given = iter(parts)
    monkeypatch.setattr(source_output_cache, "_CHUNK", 2)
    monkeypatch.setattr(source_output_cache, "_fixed", lambda *_: next(given))
    batches = as_batches((torch.zeros(4, 5), torch.zeros(4).long()), 2, CPU, shuffle=False)
    assert (source_output_cache._filled(None, batches) is not None) == kept


@pytest.mark.parametrize(("limit", "kept"), [(10**6, True), (7, False)])
def test_of_a_frozen_input_side_beyond_its_limit(limit, kept, monkeypatch):
    """Four examples with outputs of two floats: 32 bytes."""
    monkeypatch.setattr(frozen_prefix_cache, "_LIMIT", limit)
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2))
    batches = as_batches((torch.randn(4, 5), torch.zeros(4).long()), 2, CPU, shuffle=False)
    with Draws() as draws:
        found = _features(model, lambda content: model(content[0]), model[0], batches, draws)
    assert (found is not None) == kept
    if kept:
        assert torch.allclose(found, model[0](batches.take(torch.arange(4))[0]))


def test_what_is_the_same():
    assert _same(ROWS, ROWS.clone())
    assert not _same("text", ROWS)
    assert not _alike([ROWS], [ROWS[:1]])
    assert not _alike([ROWS], [])


def test_a_profiler_that_runs_keeps_its_place():
    import sys

    def profiler(*_):
        pass

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        with Draws() as draws, draws.watching():
            np.random.default_rng(0)
        assert not draws.found
        with Draws() as draws:
            drawn = np.random.default_rng(0)
        with Draws() as draws, draws.watching():
            drawn.normal()
        assert draws.found
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)
