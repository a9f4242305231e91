"""Pulls that several methods share: quadratic penalties, and proximal steps that end at the source exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.compat import foreach_abs_, foreach_clamp_max_, foreach_clamp_min_, foreach_mul_, foreach_reciprocal_
from conservtl.errors import counted
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import TINY, deviations, move_toward, norms, runs, together
from conservtl.kernels.dtensor import real_parts
from conservtl.kernels.pull import Pulled, gather
from conservtl.methods._rows import Coverage, fresh_rows, source_parameters
from conservtl.plan.penalty import Penalty, PenaltyKernel
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.update import Moving, Step, Update

__all__ = ["L2Decay", "Proximal", "Quadratic", "with_decay", "with_proximal", "with_quadratic"]


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


def with_proximal(plan: Plan, update: Proximal, beta: float | None, on: Coverage) -> Plan:
    """Return the plan with an update on parameters from the source, plain L2 on fresh ones, weight decay on neither."""
    fresh = [row.name for row in fresh_rows(plan, on)]
    if beta is not None:
        plan = with_decay(plan, update.by, dict.fromkeys(fresh, beta))
    names = source_parameters(plan, on)
    bare = {name: {"weight_decay": False} for name in names}
    plan = plan.choose(update.by, "weight_decay", bare, explicit=False)
    return plan.with_update(update.model_copy(update={"names": names}))


class Proximal(Update):
    """The proximal operator of rate × alpha × penalty of w - w0, after each step."""

    kind: Literal["proximal"] = "proximal"
    precedence: ClassVar[int] = 10
    shards: ClassVar[bool] = True
    alpha: NonNegative
    """Strength."""
    penalty: Literal["l1", "group_lasso"]
    """l1: |w - w0|_1. group_lasso: the sum over rows of sqrt(n) |d|_2, for n elements a row."""

    @property
    def name(self) -> str:
        """Kind and penalty: a plan may hold both penalties."""
        return f"{self.kind}:{self.penalty}"

    def describe(self) -> str:
        """Return one line for the plan's table."""
        threshold = "soft threshold" if self.penalty == "l1" else "soft threshold of each output channel"
        return f"{threshold} of w - w0 by rate × {self.alpha:g}, {counted(len(self.names), 'parameter')}"

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Move each element, or each row, by its threshold toward the source and no further."""
        moves, rest = split(step.moving, rows=self.penalty == "group_lasso")
        if moves is not None:
            (moves.soften if self.penalty == "l1" else moves.shrink_rows)(self.alpha, step.skip)
        for run in runs(rest):
            self._shrink(run, step.skip)

    def _shrink(self, moving: Sequence[Moving], skip: Tensor | None) -> None:
        weights, anchors, differences = deviations(moving)
        thresholds = [self._threshold(item, skip) for item in moving]
        if self.penalty == "l1":
            sizes = differences
            foreach_abs_(sizes)
        else:
            sizes = norms(differences, "row")
            roots = [math.sqrt(weight.shape[1:].numel()) for weight in weights]
            thresholds = [threshold * root for threshold, root in zip(thresholds, roots, strict=True)]
        foreach_clamp_min_(sizes, TINY)
        foreach_reciprocal_(sizes)
        foreach_mul_(sizes, thresholds)
        foreach_clamp_max_(sizes, 1.0)
        move_toward(weights, anchors, sizes)

    def _threshold(self, item: Moving, skip: Tensor | None) -> Any:
        """Return rate × alpha, or zero if the step is skipped."""
        threshold = item.group["lr"] * self.alpha
        return threshold if skip is None else threshold * (1 - skip.to(item.parameter.device).clamp(max=1).reshape(()))
