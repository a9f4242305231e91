"""The strategies. A new one is a file here, a line in ``AnyStrategy`` and a row in the contract test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from conservtl.errors import SpecError
from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy
from conservtl.strategies.discriminative_lr import DiscriminativeLR
from conservtl.strategies.feature_extraction import FeatureExtraction
from conservtl.strategies.gradual_unfreezing import GradualUnfreezing, Stage
from conservtl.strategies.l2_sp import L2SP
from conservtl.strategies.layer_transfer import LayerTransfer
from conservtl.strategies.lp_ft import LPFT
from conservtl.strategies.output_conservation import OutputConservation

__all__ = [
    "L2SP",
    "LPFT",
    "AnyStrategy",
    "DiscriminativeLR",
    "FeatureExtraction",
    "GradualUnfreezing",
    "LayerTransfer",
    "Order",
    "OutputConservation",
    "Stage",
    "Strategy",
    "apply_all",
    "as_strategy",
]

ALIASES: dict[str, dict[str, Any]] = {
    "l2sp": {"kind": "l2_sp"},
    "kld": {"kind": "output_conservation", "rho": 0.5},
    "lwf": {"kind": "output_conservation", "weight": 1.0},
}
"""Short names of ``kind`` in specs -> the fields they stand for; fields given beside one win."""


def _spelled_out(value: Any) -> Any:
    """Fields with a short name for their kind, spelled out."""
    if isinstance(value, Mapping) and value.get("kind") in ALIASES:
        return {**ALIASES[value["kind"]], **{key: field for key, field in value.items() if key != "kind"}}
    return value


AnyStrategy = Annotated[
    Annotated[
        DiscriminativeLR | FeatureExtraction | GradualUnfreezing | L2SP | LPFT | LayerTransfer | OutputConservation,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_spelled_out),
]
"""Every strategy a spec can name, told apart by ``kind``."""


def apply_all(plan: Plan, strategies: Iterable[Strategy]) -> Plan:
    """The plan after all strategies; their order in the list does not matter."""
    for strategy in sorted(strategies, key=lambda strategy: (strategy.order, strategy.kind, repr(strategy))):
        plan = strategy.apply(plan)
    return plan


def as_strategy(strategy: Strategy | Mapping[str, Any]) -> Strategy:
    """A strategy as it is, or made from the fields that a spec would hold.

    Raises:
        SpecError: it is neither, or a field is wrong.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, Mapping):
        try:
            found: Strategy = TypeAdapter(AnyStrategy).validate_python(dict(strategy))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise SpecError(f"strategies: {field}: {first['msg']}; received {dict(strategy)}.") from error
        return found
    raise SpecError(f"strategies: each must be a Strategy, such as L2SP(alpha=0.1); received {strategy!r}.")
