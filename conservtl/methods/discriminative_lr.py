"""Discriminative learning rates: each group of layers its own."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conservtl.errors import SelectorError
from conservtl.methods.base import Strategy
from conservtl.plan.plan import Plan

__all__ = ["DiscriminativeLR"]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_SHAPES = ("decay", "lowest", "thirds", "groups")


class DiscriminativeLR(Strategy):
    """Give each layer its own learning rate, by one of five rules.

    - ``decay`` d: the rate is multiplied by d for every layer away from the side that changes most
      (layer-wise decay; Howard and Ruder 2018 use 1/2.6).
    - ``lowest``: a geometric range from ``lowest`` to the full rate (fastai's ``slice``).
    - ``thirds`` (a, b, c): the two halves of the body, then the head or whatever is fresh.
    - ``groups`` {glob: rate}: parameters matched by a glob; the others take the full rate.
    - ``source`` and ``fresh``: by origin, absolute rates (practice's figures are 1e-5 and 1e-3).

    The first four are ratios of the optimizer's own rate; with ``lr`` they are absolute, and ``lr``
    is the full rate. Fresh layers take the full rate, wherever they stand. Rates are written into the
    optimizer's groups as ``lr``, so any scheduler sees them; schedule by a factor (LambdaLR), or a
    scheduler with one absolute bound makes them all equal.

    Reference:
        Howard and Ruder 2018, "Universal language model fine-tuning for text classification", 3.2.
    """

    kind: Literal["discriminative_lr"] = "discriminative_lr"
    lr: Rate | None = None
    """The full rate; None takes the optimizer's own, and makes the others ratios of it."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor from one layer to the next, away from the side that changes most."""
    lowest: Rate | None = None
    """The rate at the side that changes least."""
    thirds: tuple[Rate, Rate, Rate] | None = None
    """Rates of the body's input half, its output half, and the head or whatever is fresh."""
    groups: dict[str, Rate] | None = None
    """Glob of layers or parameters -> rate."""
    source: Rate | None = None
    """Absolute rate of what came from the source."""
    fresh: Rate | None = None
    """Absolute rate of what is fresh; combines with any of the other rules, and gives way to ``groups``."""
    toward: Literal["output", "input"] = "output"
    """Which side changes most: output for new labels, input for a new speaker or noise."""
    decay_biases_and_norms: bool = True
    """Whether the optimizer's weight decay acts on biases and norms."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in _SHAPES if getattr(self, name) is not None]
        by_origin = self.source is not None or (self.fresh is not None and not given)
        if len(given) + by_origin != 1:
            message = f"give exactly one of {', '.join(_SHAPES)} or source/fresh; received {given or 'none'}"
            raise ValueError(message + (" and source" if self.source is not None else ""))
        full = 1.0 if self.lr is None else self.lr
        if self.lowest is not None and self.lowest > full:
            raise ValueError(f"lowest={self.lowest:g} must not exceed the full rate, {full:g}")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Choose rates, and where weight decay may act."""
        values = {name: self._fields(rate) for name, rate in self._rates(plan).items()}
        if self.source is not None:
            values = {row.name: {"lr": self.source} for row in plan.rows if row.origin == "source"}
        if self.fresh is not None:
            values |= {row.name: {"lr": self.fresh} for row in plan.rows if row.origin == "fresh"}
        plan = plan.choose(self.label, "rate", values, explicit=False)
        named = {name: self._fields(rate) for name, rate in self._by_glob(plan).items()}
        plan = plan.choose(self.label, "rate", named)
        if self.decay_biases_and_norms:
            return plan
        bare = {row.name: {"weight_decay": False} for row in plan.rows if row.kind != "weight"}
        return plan.choose(self.label, "weight_decay", bare, explicit=False)

    def _fields(self, rate: float) -> dict[str, float | None]:
        return {"lr": None, "scale": rate} if self.lr is None else {"lr": rate, "scale": 1.0}

    def _rates(self, plan: Plan) -> dict[str, float]:
        """Parameter name -> rate, by the rule that was given; what a glob of ``groups`` names comes after."""
        full = 1.0 if self.lr is None else self.lr
        if self.groups is not None:
            return {} if self.lr is None else {row.name: full for row in plan.rows}
        if self.thirds is not None:
            return self._by_third(plan)
        if self.decay is None and self.lowest is None:
            return {}
        last = len(plan.layers) - 1
        away = {layer: last - i if self.toward == "output" else i for i, layer in enumerate(plan.layers)}
        step = self.decay if self.decay is not None else ((self.lowest or full) / full) ** (1 / max(1, last))
        return {row.name: full if row.origin == "fresh" else full * step ** away[row.layer] for row in plan.rows}

    def _by_third(self, plan: Plan) -> dict[str, float]:
        assert self.thirds is not None
        new = set(plan.new)
        body = list(dict.fromkeys(row.layer for row in plan.rows if row.name not in new))
        near = set(body[: (len(body) + 1) // 2])
        low, middle, high = self.thirds
        return {row.name: high if row.name in new else low if row.layer in near else middle for row in plan.rows}

    def _by_glob(self, plan: Plan) -> dict[str, float]:
        groups = self.groups or {}
        rates: dict[str, float] = {}
        for pattern, names in plan.select(tuple(groups)).items():
            if twice := sorted(set(names) & set(rates)):
                raise SelectorError(
                    f"{self.label}: {twice[0]!r} is matched by {pattern!r} and by another glob of groups. "
                    "Each parameter takes one rate: make the globs disjoint."
                )
            rates |= dict.fromkeys(names, groups[pattern])
        return rates
