"""The pull of L2-SP on weights that a product of low rank changes, from its factors alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.errors import counted
from conservtl.kernels.deviation import together
from conservtl.kernels.low_rank import squared_change
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal, Row
from conservtl.plan.update import Moving
from conservtl.spec_model import FrozenModel

__all__ = ["Factors", "MergedL2Penalty", "changed_weights", "with_merged_pull"]


class Factors(FrozenModel):
    """The factors A and B of one weight's change, scale × B A."""

    a: str
    """Name of the parameter A."""
    b: str
    """Name of the parameter B."""
    scale: float
    """Factor on the product."""
    strength: NonNegative = 0.0
    """alpha on this weight."""
    size: Annotated[int, Field(ge=1)] = 1
    """Number of elements of the weight."""


class MergedL2Penalty(Penalty):
    r"""Half the strength times each change's squared norm, :math:`\frac{1}{2} \sum_l \alpha_l s_l^2 |B_l A_l|^2`."""

    kind: Literal["merged_l2_sp"] = "merged_l2_sp"
    factors: tuple[Factors, ...]
    """The factors of each weight."""
    anchors: ClassVar[bool] = False

    def pull_on(self, row: Row) -> float | None:
        """Return the strength on the weight that a factor changes."""
        return next((pair.strength for pair in self.factors if row.name in (pair.a, pair.b)), None)

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"pull of {counted(len(self.factors), 'weight')} to the source, by the adapter's factors"

    def value(self, moving: Sequence[Moving]) -> Tensor:
        """Return the penalty on the pairs that are trained now."""
        given = {item.name: item.parameter for item in moving}
        values = [
            pair.strength / 2 * squared_change(given[pair.a], given[pair.b], pair.scale)
            for pair in self.factors
            if pair.a in given and pair.b in given
        ]
        return together(values).sum() if values else _zero(moving)

    def gradient(self, moving: Sequence[Moving]) -> list[Tensor]:
        """Return alpha s² (B^T B) A and alpha s² B (A A^T)."""
        given: dict[str, Any] = {item.name: item.parameter for item in moving}
        found: dict[str, Tensor] = {}
        for pair in self.factors:
            if pair.a not in given or pair.b not in given:
                continue
            a, b = given[pair.a].flatten(1), given[pair.b].flatten(1)
            factor = pair.strength * pair.scale**2
            found[pair.a] = (factor * (b.mT @ b) @ a).view_as(given[pair.a])
            found[pair.b] = (factor * b @ (a @ a.mT)).view_as(given[pair.b])
        return [found.get(item.name, torch.zeros_like(item.parameter)) for item in moving]


def _zero(moving: Sequence[Moving]) -> Tensor:
    return torch.zeros((), device=moving[0].parameter.device)


def changed_weights(plan: Plan) -> dict[str, Factors]:
    """Return name of a weight -> the factors of its change, of all that the plan's rows record."""
    return {
        row.low_rank.weight: Factors(a=row.low_rank.a, b=row.name, scale=row.low_rank.scale)
        for row in plan.rows
        if row.low_rank is not None
    }


def with_merged_pull(
    plan: Plan,
    by: str,
    factors: Iterable[Factors],
    mode: Literal["coupled", "decoupled"] = "coupled",
    anneal: Anneal | None = None,
) -> Plan:
    """Return the plan with the pull of weights by their factors."""
    pulled = tuple(factors)
    if not pulled:
        return plan
    names = tuple(name for pair in pulled for name in (pair.a, pair.b))
    return plan.with_penalty(MergedL2Penalty(by=by, names=names, mode=mode, anneal=anneal, factors=pulled))
