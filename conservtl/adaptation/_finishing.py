"""The end of training: the plan's ``after`` decisions, and a model without added parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.bound_plan import BoundPlan
from conservtl.batches import check_batches
from conservtl.errors import SpecError
from conservtl.functions import Forward, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy
from conservtl.plan.after import FinishContext

__all__ = ["finish", "mean_cross_entropy", "merged"]


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a model on a batch."""
    return cross_entropy(plain_forward(model, batch), batch)


def finish(
    bound: BoundPlan,
    start: dict[str, Tensor],
    batches: Iterable[Any] | None,
    forward: Forward,
    score: Callable[[], float] | None,
    valid: Iterable[Any] | None,
    objective: Callable[[nn.Module, Any], Tensor],
    margin: float,
) -> dict[str, Any]:
    """Carry out the plan's ``after`` decisions that are not done yet; arguments as for ``Adaptation.finish``.

    Returns:
        Name of each decision -> its facts for a report.

    Raises:
        SpecError: a decision needs a validation part, and there is none.
    """
    for name, given in {"batches": batches, "valid": valid}.items():
        if given is not None and bound.plan.after:
            check_batches(given, f"finish({name}=...)")
    bound.restore_weights()
    done = bound.endings.done
    for after in bound.plan.after:
        if after.name in done:
            continue
        if type(after).scored and score is None and valid is None:
            raise SpecError(f"{after.by} chooses on a validation part: pass score or valid, or give fit valid={{...}}.")
        context = FinishContext(unwrap(bound.model), start, batches, forward, score, valid, objective, margin)
        with torch.no_grad():
            done[after.name] = after.finish(context)
    bound.endings.finished()
    bound.register_hooks()
    return dict(done)


def merged(bound: BoundPlan) -> nn.Module:
    """Return a copy of the model in which each strategy has merged what it added, if that is exact."""
    bound.endings.exported()
    bound.restore_weights()
    model = deep_copy(unwrap(bound.model))
    for strategy in bound.origin.strategies:
        strategy.merge(model)
    return model
