"""Part of the contract: ``apply`` is a pure function from plan to plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from conservtl.errors import InputError
from conservtl.layers import find_layers
from conservtl.methods import Strategy, apply_all
from conservtl.methods.discriminative_lr import DiscriminativeLR
from conservtl.methods.gradual_unfreezing import GradualUnfreezing
from conservtl.methods.l2_sp import L2SP
from conservtl.methods.layer_transfer import LayerTransfer
from conservtl.plan.plan import Plan
from conservtl.testing._cases import require

__all__ = ["check_memory", "check_place", "check_pure"]

_DESCRIPTIVE = ("name", "layer", "depth", "shape", "kind", "source_shape")
_COMPANIONS: tuple[Strategy, ...] = (
    LayerTransfer(layers=1),
    L2SP(alpha=0.1),
    DiscriminativeLR(decay=0.5),
    GradualUnfreezing(),
)


def check_pure(strategy: Strategy, plan: Plan) -> None:
    """Raise unless ``apply`` gives the same valid plan each time, keeps the rows and draws no random numbers."""
    state = torch.get_rng_state()
    result = strategy.apply(plan)
    require(isinstance(result, Plan), strategy, f"apply must return a Plan; it returned {type(result).__name__}.")
    require(torch.equal(state, torch.get_rng_state()), strategy, "apply drew random numbers; a plan has none.")
    require(strategy.apply(plan) == result, strategy, "apply gives another plan the second time.")
    require(len(result.rows) == len(plan.rows), strategy, "apply added or dropped rows.")
    for old, new in zip(plan.rows, result.rows, strict=True):
        for field in _DESCRIPTIVE:
            rule = f"apply changed {field} of row {old.name!r}, which describes the model and is no decision."
            require(getattr(old, field) == getattr(new, field), strategy, rule)
    again = Plan(**result.model_dump(mode="json"))
    require(again == result, strategy, "its plan differs after JSON.")


def check_place(strategy: Strategy, plan: Plan) -> None:
    """Raise unless the plan is the same wherever the strategy stands in the list."""
    for other in _COMPANIONS:
        first, last = _outcome(plan, [strategy, other]), _outcome(plan, [other, strategy])
        rule = f"gives another plan before {other.label} than after it; declare in order what it reads."
        require(first == last, strategy, rule)


def check_memory(strategy: Strategy, plan: Plan) -> None:
    """Raise unless the plan is the same after the strategy was applied to another plan."""
    result = strategy.apply(plan)
    layers = find_layers(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    other = Plan.draw(layers, {info.name: info.shape for layer in layers for info in layer.parameters}, {})
    _outcome(other, [strategy])
    require(strategy.apply(plan) == result, strategy, "remembers the plans it was applied to before.")


def _outcome(plan: Plan, strategies: Sequence[Strategy]) -> Plan | str:
    """Return the plan after strategies, or that they were refused."""
    try:
        return apply_all(plan, strategies)
    except InputError:
        return "refused"
