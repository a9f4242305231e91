"""Quadratic penalties: half a strength times the squared distance to the source, or to zero for fresh parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from conservtl.errors import counted
from conservtl.kernels.deviation import together
from conservtl.kernels.dtensor import real_parts
from conservtl.kernels.pull import Pulled, gather
from conservtl.plan.penalty import Penalty, PenaltyKernel
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.update import Moving

__all__ = ["L2Decay", "Quadratic", "with_decay", "with_quadratic"]


class Quadratic(Penalty):
    r"""Half the strength times the sum of squared differences, weighed by the measurements it reads.

    .. math:: \frac{1}{2} \sum_p s_p \sum_j F_{pj} (w_{pj} - w^0_{pj})^2

    with s the strength in each parameter's row, F the product of the measurements, and w^0 zero without an anchor.
    """

    sums_over: ClassVar[Literal["elements", "rows", "parameters", "all"]] = "elements"

    def value(self, moving: Sequence[Moving]) -> Tensor:
        """Return the penalty."""
        values = []
        for item in moving:
            square = real_parts(item.parameter if item.anchor is None else item.parameter - item.anchor).square()
            weights = self._weights(item)
            values.append(self._strength(item.row) / 2 * (square if weights is None else square * weights).sum())
        return together(values).sum()

    def gradient(self, moving: Sequence[Moving]) -> list[Tensor]:
        """Return strength × F × (w - w0) of each parameter."""
        gradients = []
        for item in moving:
            difference = item.parameter if item.anchor is None else item.parameter - item.anchor
            weights = self._weights(item)
            gradients.append(self._strength(item.row) * (difference if weights is None else difference * weights))
        return gradients

    def kernels(self, moving: Sequence[Moving]) -> Sequence[PenaltyKernel]:
        """Return pulls, which go through the weights in as few passes as possible."""
        return gather(
            Pulled(
                item.parameter,
                item.anchor,
                strength,
                item.group if self.mode == "decoupled" else None,  # coupled, one kernel serves all rates
                self._weights(item),
                self.every,
            )
            for item in moving
            if (strength := self._strength(item.row))
        )

    @property
    def _rhythm(self) -> str:
        """The number of steps from one pull to the next, for the plan's table."""
        return "" if self.every == 1 else f", every {self.every} steps"

    def _strength(self, row: Row) -> float:
        return self.strength_on(row) or 0.0

    def _weights(self, item: Moving) -> Tensor | None:
        weights = None
        for name in self.reads:
            weights = item.measured[name] if weights is None else weights * item.measured[name]
        return weights


class L2Decay(Quadratic):
    r"""Plain L2 on fresh parameters: :math:`\frac{\beta}{2} \lVert w_N \rVert_2^2`, with beta in their rows."""

    kind: Literal["l2_decay"] = "l2_decay"
    column: ClassVar[Literal["pull", "decay"] | None] = "decay"
    anchors: ClassVar[bool] = False

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"plain L2 on {counted(len(self.names), 'fresh parameter')}"


def with_decay(
    plan: Plan, by: str, beta: Mapping[str, float], mode: Literal["coupled", "decoupled"] = "coupled"
) -> Plan:
    """Return the plan with plain L2 on fresh parameters.

    Strategies that give the same strength share one penalty. It is decoupled if one of them is.
    """
    return with_quadratic(plan, L2Decay(by=by, names=(), mode=mode), beta)


def with_quadratic(plan: Plan, penalty: Quadratic, strengths: Mapping[str, float]) -> Plan:
    """Return the plan with strengths in a penalty's column, and the penalty, given without names, on their rows."""
    if not strengths or penalty.column is None:
        return plan
    chosen: dict[str, dict[str, Any]] = {name: {penalty.column: strength} for name, strength in strengths.items()}
    plan = plan.choose(penalty.by, penalty.column, chosen, explicit=False)
    present = next((other for other in plan.penalties if other.name == penalty.name), None)
    joined = {*strengths, *(present.names if present is not None else ())}
    names = tuple(row.name for row in plan.rows if row.name in joined)
    # The author of the first row, so that the order of the strategies does not matter.
    merged = penalty.model_copy(update={"names": names, "by": plan[names[0]].chosen[penalty.column].by})
    if present is None:
        return plan.with_penalty(merged)
    if isinstance(penalty, L2Decay):
        mode = "decoupled" if "decoupled" in (penalty.mode, present.mode) else "coupled"
        return plan.with_penalty(merged.model_copy(update={"mode": mode}), replace=True)
    alike = present.model_copy(update={"names": merged.names, "by": merged.by}) == merged
    return plan.with_penalty(merged, replace=alike)
