"""The strategies. A new one is a file here, a line in ``AnyStrategy`` and a row in the contract test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import nn

from conservtl.errors import SelectorError, SpecError, wrong_tag
from conservtl.layers import find_layers, matches
from conservtl.methods.auto_rgn import AutoRGN
from conservtl.methods.base import Order, Strategy
from conservtl.methods.discriminative_lr import DiscriminativeLR
from conservtl.methods.feature_conservation.strategy import FeatureConservation
from conservtl.methods.feature_extraction.strategy import FeatureExtraction
from conservtl.methods.fisher_sp import FisherSP
from conservtl.methods.gradual_unfreezing import GradualUnfreezing, Stage
from conservtl.methods.group_lasso_sp import GroupLassoSP
from conservtl.methods.input_transform.strategy import InputTransform
from conservtl.methods.l1_sp import L1SP
from conservtl.methods.l2_sp import L2SP
from conservtl.methods.layer_transfer import LayerTransfer
from conservtl.methods.lhuc import LHUC
from conservtl.methods.lp_ft import LPFT
from conservtl.methods.mixout import Mixout
from conservtl.methods.norm_adaptation.strategy import NormAdaptation
from conservtl.methods.output_conservation import OutputConservation
from conservtl.methods.projection.strategy import Projection
from conservtl.methods.selective_decay import SelectiveDecay
from conservtl.methods.spectral_shrinkage import SpectralShrinkage
from conservtl.methods.surgical_fine_tuning import SurgicalFineTuning
from conservtl.methods.weight_interpolation import WeightInterpolation
from conservtl.plan.plan import Plan

__all__ = [
    "L1SP",
    "L2SP",
    "LHUC",
    "LPFT",
    "AnyStrategy",
    "AutoRGN",
    "DiscriminativeLR",
    "FeatureConservation",
    "FeatureExtraction",
    "FisherSP",
    "GradualUnfreezing",
    "GroupLassoSP",
    "InputTransform",
    "LayerTransfer",
    "Mixout",
    "NormAdaptation",
    "Order",
    "OutputConservation",
    "Projection",
    "SelectiveDecay",
    "SpectralShrinkage",
    "Stage",
    "Strategy",
    "SurgicalFineTuning",
    "WeightInterpolation",
    "apply_all",
    "as_strategy",
    "extend_all",
    "retract_all",
]

ALIASES: dict[str, dict[str, Any]] = {
    "l2sp": {"kind": "l2_sp"},
    "bss": {"kind": "spectral_shrinkage"},
    "delta": {"kind": "feature_conservation", "attention": True},
    "ewc": {"kind": "fisher_sp", "data": "source"},
    "kld": {"kind": "output_conservation", "rho": 0.1},
    "spd": {"kind": "selective_decay"},
    "ldifs": {"kind": "feature_conservation", "metric": "ldifs"},
    "lwf": {"kind": "output_conservation", "weight": 0.05},
    "wise_ft": {"kind": "weight_interpolation"},
}
"""Short names of ``kind`` in specs -> the fields they stand for; fields given beside one win."""


def _spelled_out(value: Any) -> Any:
    """Fields with a short name for their kind, spelled out."""
    if isinstance(value, Mapping) and value.get("kind") in ALIASES:
        return {**ALIASES[value["kind"]], **{key: field for key, field in value.items() if key != "kind"}}
    return value


AnyStrategy = Annotated[
    Annotated[
        AutoRGN
        | DiscriminativeLR
        | FeatureConservation
        | FeatureExtraction
        | FisherSP
        | GradualUnfreezing
        | GroupLassoSP
        | InputTransform
        | L1SP
        | L2SP
        | LayerTransfer
        | LHUC
        | LPFT
        | Mixout
        | NormAdaptation
        | OutputConservation
        | Projection
        | SelectiveDecay
        | SpectralShrinkage
        | SurgicalFineTuning
        | WeightInterpolation,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_spelled_out),
]
"""Every strategy a spec can name, told apart by ``kind``."""


def apply_all(plan: Plan, strategies: Iterable[Strategy]) -> Plan:
    """The plan after all strategies; their order in the list does not matter."""
    for strategy in sorted(strategies, key=lambda strategy: (strategy.order, strategy.kind, repr(strategy))):
        try:
            plan = strategy.apply(plan)
        except SelectorError as error:
            raise SelectorError(f"{strategy.label}: {error}") from None
    return plan


def extend_all(
    model: nn.Module, strategies: Iterable[Strategy], example: Any = None, layers: Sequence[str] | None = None
) -> tuple[dict[str, str], Sequence[str] | None]:
    """Let strategies add what they need to a model, in place: all of them, or none where one refuses.

    Args:
        model: wrapped or not.
        strategies: in the order they add it.
        example: an input, or None.
        layers: the caller's own cut into layers, or None.

    Returns:
        Name of each added parameter -> what it is; and the cut, with what no glob of it matches in front (an input
        transform, say).
    """
    added: dict[str, str] = {}
    done: list[Strategy] = []
    try:
        for one in (one for one in strategies if one.extends):
            new = one.extend(model, find_layers(model, example, layers), example)
            done.append(one)
            added |= new
            if layers is not None:
                left = [name.rpartition(".")[0] for name in new if not any(matches(glob, name) for glob in layers)]
                layers = [*dict.fromkeys(left), *layers]
    except BaseException:
        retract_all(model, done)
        raise
    return added, layers


def retract_all(model: nn.Module, strategies: Iterable[Strategy]) -> None:
    """Take away what strategies added to a model."""
    for one in strategies:
        one.retract(model)


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
            if first["type"] == "union_tag_invalid":
                raise SpecError(f"strategies: {wrong_tag(first, list(ALIASES))}") from error
            field = ".".join(str(part) for part in first["loc"])
            raise SpecError(f"strategies: {field}: {first['msg']}; received {dict(strategy)}.") from error
        return found
    raise SpecError(f"strategies: each must be a Strategy, such as L2SP(alpha=0.1); received {strategy!r}.")
