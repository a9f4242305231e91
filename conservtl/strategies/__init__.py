"""The strategies. A new one is a file here, a line in ``AnyStrategy`` and a row in the contract test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy
from conservtl.strategies.discriminative_lr import DiscriminativeLR
from conservtl.strategies.feature_extraction import FeatureExtraction
from conservtl.strategies.gradual_unfreezing import GradualUnfreezing, Stage
from conservtl.strategies.l2_sp import L2SP
from conservtl.strategies.layer_transfer import LayerTransfer

__all__ = [
    "L2SP",
    "AnyStrategy",
    "DiscriminativeLR",
    "FeatureExtraction",
    "GradualUnfreezing",
    "LayerTransfer",
    "Order",
    "Stage",
    "Strategy",
    "apply_all",
]

AnyStrategy = Annotated[
    DiscriminativeLR | FeatureExtraction | GradualUnfreezing | L2SP | LayerTransfer,
    Field(discriminator="kind"),
]
"""Every strategy a spec can name, told apart by ``kind``."""


def apply_all(plan: Plan, strategies: Iterable[Strategy]) -> Plan:
    """The plan after all strategies; their order in the list does not matter."""
    for strategy in sorted(strategies, key=lambda strategy: (strategy.order, strategy.kind, repr(strategy))):
        plan = strategy.apply(plan)
    return plan
