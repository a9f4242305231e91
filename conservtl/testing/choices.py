"""Lists of strategies that fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from torch import nn

from conservtl.errors import InputError
from conservtl.layers import find_layers
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy, apply_all, builtin_strategies, extend_all, record_all
from conservtl.plan.plan import Plan
from conservtl.testing.fields import FieldRanges, instances_within

__all__ = ["strategies", "whole_plan"]

_LARGEST = 2.0
"""Largest strength without a bound of its own: an optimizer with a rate of 0.1 stays stable."""


@st.composite
def strategies(
    draw: st.DrawFn,
    model: nn.Module,
    example: Any = None,
    *,
    max_size: int = 3,
    measured: bool = False,
    kinds: Sequence[type[Strategy]] | None = None,
) -> list[Strategy]:
    """Draw lists of strategies that agree with each other and leave the model something to train.

    The source is taken to have every parameter of the model. Fields are drawn within the bounds of their types and
    the class's ``test_fields``; strings are names of layers. An optimizer with a rate up to 0.1 stays stable.

    Args:
        draw: given by hypothesis.
        model: the model to adapt.
        example: its input, which shows the order of the layers.
        max_size: length of the longest list.
        measured: whether strategies are drawn that need ``adaptation.measure(batches)`` before an optimizer is made.
        kinds: classes to draw from. None: all built-in ones.

    Example:
        >>> import conservtl as ctl, torch
        >>> from hypothesis import given, settings
        >>> from conservtl.testing import strategies
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> @settings(max_examples=5, deadline=None)
        ... @given(strategies(model, kinds=[ctl.L2SP, ctl.LayerTransfer]))
        ... def test_they_agree(chosen):
        ...     source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ...     assert ctl.adapt(model, source, chosen).plan.trained
        >>> test_they_agree()
    """
    agreeing: list[Strategy] = []
    classes = list(builtin_strategies().values()) if kinds is None else list(kinds)
    for drawn in draw(st.lists(_any(whole_plan(model, example), classes), min_size=1, max_size=max_size)):
        try:
            plan = apply_all(whole_plan(model, example, [*agreeing, drawn]), [*agreeing, drawn])
            for decision in plan.decisions:
                decision.check(model)
        except InputError:
            continue
        if plan.trained and (measured or not (plan.measures or plan.searches)):
            agreeing.append(drawn)
    return agreeing


def whole_plan(model: nn.Module, example: Any = None, strategies: Sequence[Strategy] = ()) -> Plan:
    """Return the plan of a model whose source has every parameter but those that these strategies add."""
    extending = [strategy for strategy in strategies if strategy.extends]
    model = deep_copy(model) if extending else model
    added, _ = extend_all(model, extending, example)
    layers = find_layers(model, example)
    infos = [info for layer in layers for info in layer.parameters]
    shapes = {info.name: info.shape for info in infos if info.name not in added}
    return record_all(Plan.draw(layers, shapes, added, (), added), extending)


def _any(plan: Plan, classes: Sequence[type[Strategy]]) -> st.SearchStrategy[Strategy]:
    names = st.sampled_from([row.name for row in plan.rows])
    ranges = FieldRanges(st.sampled_from(plan.layers), names, _LARGEST, tested=True)
    return st.sampled_from(classes).flatmap(lambda cls: instances_within(cls, ranges))
