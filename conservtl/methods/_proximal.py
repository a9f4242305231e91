"""Proximal steps toward the source: penalties with a corner there, so that weights really return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.compat import foreach_abs_, foreach_clamp_max_, foreach_clamp_min_, foreach_mul_, foreach_reciprocal_
from conservtl.kernels.deviation import TINY, deviations, move_toward, norms, runs
from conservtl.methods._quadratic import decayed
from conservtl.plan.decision import Moving, Step, Update
from conservtl.plan.plan import Plan

__all__ = ["Proximal", "with_proximal"]


def with_proximal(plan: Plan, update: Proximal, beta: float | None, *, everything: bool) -> Plan:
    """The plan with an update on what came from the source, decays for what is fresh, and no weight decay on either.

    Args:
        plan: to add to.
        update: without names yet.
        beta: strength on fresh rows; None leaves them to others.
        everything: whether biases and norms are covered too.
    """
    covered = plan.rows_on("all" if everything else "weights")
    names = tuple(row.name for row in covered if row.origin == "source" and not row.frozen)
    if beta is not None:
        plan = decayed(plan, update.by, {row.name: beta for row in covered if row.origin == "fresh"})
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
    """l1: |w - w0|_1. group_lasso: the sum over rows of sqrt(n) |d|_2, n elements a row."""

    @property
    def name(self) -> str:
        """Both penalties at once are two updates."""
        return f"{self.kind}:{self.penalty}"

    def describe(self) -> str:
        """One line for the plan's table."""
        what = "soft threshold" if self.penalty == "l1" else "soft threshold of each output channel"
        return f"{what} of w - w0 by rate × {self.alpha:g}, {len(self.names)} parameters"

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Move every element, or every row, its threshold toward the source, and no further."""
        for run in runs(step.moving):
            self._move(run, step.skip)

    def _move(self, moving: Sequence[Moving], skip: Tensor | None) -> None:
        weights, anchors, moved = deviations(moving)
        thresholds = [self._threshold(item, skip) for item in moving]
        if self.penalty == "l1":
            sizes = moved
            foreach_abs_(sizes)
        else:
            sizes = norms(moved, "row")
            roots = [math.sqrt(item.parameter.shape[1:].numel()) for item in moving]
            thresholds = [threshold * root for threshold, root in zip(thresholds, roots, strict=True)]
        foreach_clamp_min_(sizes, TINY)
        foreach_reciprocal_(sizes)
        foreach_mul_(sizes, thresholds)
        foreach_clamp_max_(sizes, 1.0)
        move_toward(weights, anchors, sizes)

    def _threshold(self, item: Moving, skip: Tensor | None) -> Any:
        """Rate × alpha, zero in a step that is skipped."""
        threshold = item.group["lr"] * self.alpha
        return threshold if skip is None else threshold * (1 - skip.to(item.parameter.device).clamp(max=1).reshape(()))
