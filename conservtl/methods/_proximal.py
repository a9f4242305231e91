"""Proximal steps toward the source: penalties with a corner there, so that weights return to it exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.compat import foreach_abs_, foreach_clamp_max_, foreach_clamp_min_, foreach_mul_, foreach_reciprocal_
from conservtl.errors import counted
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import TINY, deviations, move_toward, norms, runs
from conservtl.methods._quadratic import with_decay
from conservtl.methods._rows import Coverage, fresh_rows, source_parameters
from conservtl.plan.plan import Plan
from conservtl.plan.update import Moving, Step, Update

__all__ = ["Proximal", "with_proximal"]


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
