"""Lists of strategies that fit a model."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import nn

from conservtl.errors import InputError
from conservtl.layers import find_layers
from conservtl.plan import Plan
from conservtl.strategies import (
    L2SP,
    DiscriminativeLR,
    FeatureExtraction,
    GradualUnfreezing,
    LayerTransfer,
    Stage,
    Strategy,
    apply_all,
)
from conservtl.testing.fields import instances

__all__ = ["strategies"]

_RATE = st.floats(1e-6, 0.4, allow_subnormal=False)
_SHARE = st.floats(0.1, 1.0)


@st.composite
def strategies(draw: st.DrawFn, model: nn.Module, example: Any = None, *, max_size: int = 3) -> list[Strategy]:
    """Lists of built-in strategies that agree with each other and leave the model something to train.

    The source is taken to have every parameter of the model. Strengths are such that an optimizer with a
    rate up to 0.1 can carry them out.

    Args:
        draw: hypothesis' own.
        model: the model they are for.
        example: its input, for the order of layers.
        max_size: the longest list.
    """
    plan = whole_plan(model, example)
    kept: list[Strategy] = []
    for one in draw(st.lists(_any(plan), min_size=1, max_size=max_size)):
        try:
            agreed = apply_all(plan, [*kept, one])
        except InputError:
            continue
        if agreed.trained:
            kept.append(one)
    return kept


def whole_plan(model: nn.Module, example: Any = None) -> Plan:
    """The plan of a model whose source has everything."""
    layers = find_layers(model, example)
    return Plan.draw(layers, {info.name: info.shape for layer in layers for info in layer.parameters}, {})


def _any(plan: Plan) -> st.SearchStrategy[Strategy]:
    globs = st.lists(st.sampled_from(plan.layers), min_size=1, max_size=3, unique=True).map(tuple)
    exact = st.dictionaries(st.sampled_from([row.name for row in plan.rows]), _RATE, min_size=1, max_size=3)
    count = st.integers(1, len(plan.layers))
    stage = instances(Stage, train=st.none() | globs, epochs=st.integers(1, 3), scale=_SHARE)
    stages = st.lists(stage, min_size=1, max_size=3).map(tuple)
    full = st.none() | st.floats(0.4, 0.5)
    shapes: list[dict[str, st.SearchStrategy[Any]]] = [
        {"decay": _SHARE},
        {"lowest": _RATE},
        {"thirds": st.tuples(_RATE, _RATE, _RATE)},
        {"groups": exact},
        {"source": _RATE},
    ]
    rates = [
        instances(
            DiscriminativeLR,
            lr=full,
            fresh=st.none() | _RATE,
            **{name: shape.get(name, st.none()) for name in ("decay", "lowest", "thirds", "groups", "source")},
        )
        for shape in shapes
    ]
    pull = instances(
        L2SP, alpha=st.none() | st.floats(0, 2), beta=st.floats(0, 1), depth=st.none() | st.tuples(_SHARE, _SHARE)
    )
    ends = instances(GradualUnfreezing, phases=st.none(), epochs=st.integers(1, 3), scales=st.tuples(_SHARE, _SHARE))
    kinds: list[st.SearchStrategy[Any]] = [
        pull,
        st.one_of(rates),
        instances(LayerTransfer, layers=st.one_of(count, _SHARE, globs)),
        instances(FeatureExtraction),
        ends | stages.map(lambda phases: GradualUnfreezing(phases=phases)),
    ]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)
