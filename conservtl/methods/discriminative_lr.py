"""Discriminative learning rates: a learning rate for each group of layers."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from conservtl.bounds import Fraction, Positive
from conservtl.errors import SelectorError
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["DiscriminativeLR"]

_TESTED = Span(1e-6, 0.4)

_RULES = ("decay", "lowest", "thirds", "groups")


class DiscriminativeLR(Strategy):
    """Give each layer its own learning rate, by one of five rules.

    - ``decay`` d: the rate is multiplied by d for each layer away from the side that changes most (layer-wise decay;
      Howard and Ruder 2018 use 1/2.6).
    - ``lowest``: a geometric range from ``lowest`` to the full rate (fastai's ``slice``).
    - ``thirds`` (a, b, c): the two halves of the body, then the head or the fresh parameters.
    - ``groups`` {glob: rate}: the parameters that each glob matches; all others take the full rate.
    - ``source`` and ``fresh``: absolute rates by origin (common values are 1e-5 and 1e-3).

    The first four are ratios of the optimizer's rate, unless ``lr`` is given: they are absolute then, and ``lr`` is
    the full rate. Fresh layers take the full rate at any depth; factors of low rank (``LoRA``) that of the weight which
    they change. The rates are written into the optimizer's groups as
    ``lr``, so every scheduler sees them. ``adaptation.scheduler(...)`` makes one that keeps their ratios: by itself, a
    scheduler with one absolute bound (OneCycleLR) makes them all equal.

    Cost: none but one optimizer group for each rate.

    Hurts: where the target differs at the input side, whose layers then train too slowly:
    ``toward="input"`` turns the order round.

    Reference:
        Howard and Ruder 2018, "Universal language model fine-tuning for text classification", 3.2.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.DiscriminativeLR(decay=0.1)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
        >>> [round(adaptation.plan[f"{layer}.weight"].rate(base=1.0), 3) for layer in range(3)]
        [0.01, 0.1, 1.0]
    """

    kind: Literal["discriminative_lr"] = "discriminative_lr"
    test_fields: ClassVar[TestFields] = tuple(
        dict.fromkeys(["decay", "lowest", "thirds", "groups", "source"])
        | {"lr": [None, Span(0.4, 0.5)], "fresh": [None, _TESTED], rule: values}
        for rule, values in {
            "decay": Span(0.1, 1),
            "lowest": _TESTED,
            "thirds": (_TESTED, _TESTED, _TESTED),
            "groups": {str: _TESTED},
            "source": _TESTED,
        }.items()
    )
    lr: Positive | None = None
    """Full rate. None: the optimizer's own, with the others as ratios of it."""
    decay: Fraction | None = None
    """Factor from one layer to the next, away from the side that changes most."""
    lowest: Positive | None = None
    """Rate at the side that changes least."""
    thirds: tuple[Positive, Positive, Positive] | None = None
    """Rates of the body's input half, its output half, and the head or the fresh parameters."""
    groups: dict[str, Positive] | None = None
    """Glob of layers or parameters -> rate."""
    source: Positive | None = None
    """Absolute rate of parameters from the source."""
    fresh: Positive | None = None
    """Absolute rate of fresh parameters, and of a head with rows for new labels. It combines with every other rule;
    ``groups`` overrules it."""
    toward: Literal["output", "input"] = "output"
    """Side that changes most: output for new labels, input for a new speaker or noise."""
    decay_biases_and_norms: bool | None = None
    """Whether the optimizer's weight decay acts on biases and norms, and on what acts as they do: tables of position
    biases, scales of channels, tokens. None: it does not, unless another strategy
    decides so. It needs no rule of rates beside it."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in _RULES if getattr(self, name) is not None]
        by_origin = self.source is not None or (self.fresh is not None and not given)
        alone = self.decay_biases_and_norms is not None and self.lr is None and not given
        if len(given) + by_origin != 1 and not (alone and not by_origin):
            message = f"give exactly one of {', '.join(_RULES)} or source/fresh; received {given or 'none'}"
            raise ValueError(message + (" and source" if self.source is not None else ""))
        if self.lowest is not None and self.lowest > self._full:
            raise ValueError(f"lowest={self.lowest:g} must not exceed the full rate, {self._full:g}")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Choose rates, and the parameters on which weight decay may act."""
        values = {name: self._fields(rate) for name, rate in self._by_depth(plan).items()}
        if self.source is not None:
            copied = [row.name for row in plan.rows if row.origin == "source"]
            values = {name: {"lr": self.source} for name in (*copied, *plan.factors)}
        if self.fresh is not None:
            values |= {name: {"lr": self.fresh} for name in plan.fresh}
        plan = plan.choose(self.label, "rate", values, explicit=False)
        named = {name: self._fields(rate) for name, rate in self._by_glob(plan).items()}
        plan = plan.choose(self.label, "rate", named)
        if self.decay_biases_and_norms is None:
            return plan
        fields = {"weight_decay": self.decay_biases_and_norms}
        others = {row.name: fields for row in plan.rows if row.like_bias}
        return plan.choose(self.label, "weight_decay", others, explicit=False)

    @property
    def _full(self) -> float:
        return 1.0 if self.lr is None else self.lr

    def _fields(self, rate: float) -> dict[str, float | None]:
        return {"lr": None, "scale": rate} if self.lr is None else {"lr": rate, "scale": 1.0}

    def _by_depth(self, plan: Plan) -> dict[str, float]:
        """Return a rate for each parameter by ``decay``, ``lowest`` or ``thirds``, or else the full rate."""
        if self.groups is not None:
            return {} if self.lr is None else {row.name: self._full for row in plan.rows}
        if self.thirds is not None:
            return self._by_third(plan, self.thirds)
        if self.decay is None and self.lowest is None:
            return {}
        full, depths = self._full, _depths(plan)
        last = max(depths.values())
        steps = {layer: last - i if self.toward == "output" else i for layer, i in depths.items()}
        decay = self.decay if self.decay is not None else ((self.lowest or full) / full) ** (1 / max(1, last))
        fresh = set(plan.fresh)
        return {row.name: full if row.name in fresh else full * decay ** steps[row.layer] for row in plan.rows}

    @staticmethod
    def _by_third(plan: Plan, thirds: tuple[float, float, float]) -> dict[str, float]:
        new = set(plan.new)
        body = list(dict.fromkeys(row.layer for row in plan.rows if row.name not in new))
        input_half = set(body[: (len(body) + 1) // 2])
        low, middle, high = thirds
        return {row.name: high if row.name in new else low if row.layer in input_half else middle for row in plan.rows}

    def _by_glob(self, plan: Plan) -> dict[str, float]:
        groups = self.groups or {}
        rates: dict[str, float] = {}
        for glob, names in plan.select(tuple(groups)).items():
            if twice := sorted(set(names) & set(rates)):
                raise SelectorError(
                    f"{self.label}: {twice[0]!r} is matched by {glob!r} and by another glob of groups. "
                    "Each parameter takes one rate: make the globs disjoint."
                )
            rates |= dict.fromkeys(names, groups[glob])
        return rates


def _depths(plan: Plan) -> dict[str, int]:
    """Return the place of each layer, input side first; parallel heads share the last."""
    heads = {plan[name].layer for name in plan.possible_head}
    if len(heads) < 2:
        return {layer: place for place, layer in enumerate(plan.layers)}
    body = [layer for layer in plan.layers if layer not in heads]
    return {layer: body.index(layer) if layer in body else len(body) for layer in plan.layers}
