"""Time: how many steps there are, the factor on all rates at each, and the phase of each epoch."""

from __future__ import annotations

import math

from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.plan.plan import Plan

__all__ = ["phase_of_epoch", "schedule_factor", "total_steps"]


def schedule_factor(training: Training, step: int, steps: int) -> float:
    """Factor on all rates at a step, 0 to ``steps`` - 1.

    one_cycle rises over 30 % of the steps from 1/25 to 1 and falls to 0, both along a cosine (Smith
    and Topin 2018, as fastai has it).
    """
    if training.schedule == "one_cycle":
        rise = max(1.0, 0.3 * steps)
        if step < rise:
            return 0.04 + 0.96 * _cosine(1 - step / rise)
        return _cosine((step - rise) / max(1.0, steps - rise))
    warm = training.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 1.0 if training.schedule == "constant" else _cosine((step - warm) / max(1.0, steps - warm))


def total_steps(training: Training, batches: int | None) -> int:
    """Optimizer steps of a run, 0 where nobody knows.

    Args:
        training: settings.
        batches: batches an epoch, None where unknown.

    Raises:
        SpecError: the schedule needs a length that the data does not have, or has no use for a warm-up.
    """
    if training.schedule == "one_cycle" and training.warmup:
        raise SpecError(
            f"training.warmup is {training.warmup:g}, but one_cycle warms up by itself over 30 % of the steps. "
            "Leave warmup out, or set schedule to cosine."
        )
    if batches is not None:
        return training.epochs * math.ceil(batches / training.accumulate)
    if training.schedule != "constant" or training.warmup:
        raise SpecError(
            f"training.schedule is {training.schedule}, which needs to know the number of steps, but the training data "
            "has no length. Use constant without warmup, or data with a length."
        )
    return 0


def phase_of_epoch(plan: Plan, epochs: int) -> list[int]:
    """The phase of each epoch.

    Raises:
        SpecError: the phases take more or fewer epochs.
    """
    lengths = [phase.length(epochs) for phase in plan.phases]
    order = [n for n, length in enumerate(lengths) for _ in range(length or 0)]
    if lengths[-1] is None:
        order += [len(plan.phases) - 1] * max(0, epochs - len(order))
    if len(order) != epochs or order[-1] != len(plan.phases) - 1:
        needed = sum(length or 1 for length in lengths)
        raise SpecError(
            f"training.epochs is {epochs}, but the plan's phases ({', '.join(p.name for p in plan.phases)}) take "
            f"{'at least ' if lengths[-1] is None else ''}{needed}. Change one of the two."
        )
    return order


def _cosine(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
