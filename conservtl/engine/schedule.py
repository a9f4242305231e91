"""Schedule: the number of steps, the factor on all rates at each step, and the phase of each epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from conservtl.errors import SpecError
from conservtl.plan.plan import Plan

if TYPE_CHECKING:
    from conservtl.engine.training import Training

__all__ = ["phase_of_epoch", "schedule_factor", "total_steps"]


def schedule_factor(training: Training, step: int, steps: int) -> float:
    """Return the factor on all rates at a step.

    one_cycle rises over 30 % of the steps from 1/25 to 1 and then falls to 0, both along a cosine, as in fastai.

    Reference:
        Smith and Topin 2018, "Super-convergence: very fast training of neural networks using large learning rates".
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


def total_steps(training: Training, steps: int | None) -> int:
    """Return the number of optimizer steps of a run, given that of an epoch; 0 if unknown.

    Raises:
        SpecError: the schedule needs the number of steps and the data has no length, or a warm-up is set for one_cycle.
    """
    if training.schedule == "one_cycle" and training.warmup:
        raise SpecError(
            f"training.warmup is {training.warmup:g}, but one_cycle warms up by itself over 30 % of the steps. "
            "Leave warmup out, or set schedule to cosine."
        )
    if steps is not None:
        return training.epochs * steps
    if training.schedule != "constant" or training.warmup:
        raise SpecError(
            f"training.schedule is {training.schedule}, which needs the number of steps, but the training data has no "
            "length. Use constant without warmup, or data with a length."
        )
    return 0


def phase_of_epoch(plan: Plan, epochs: int, setting: str = "training.epochs") -> list[int]:
    """Return the phase of each epoch; raise if the phases take more or fewer epochs than the run."""
    lengths = [phase.length(epochs) for phase in plan.phases]
    order = [n for n, length in enumerate(lengths) for _ in range(length or 0)]
    if lengths[-1] is None:
        order += [len(plan.phases) - 1] * max(0, epochs - len(order))
    if len(order) != epochs or order[-1] != len(plan.phases) - 1:
        needed = sum(length or 1 for length in lengths)
        raise SpecError(
            f"{setting} is {epochs}, but the plan's phases ({', '.join(p.name for p in plan.phases)}) take "
            f"{'at least ' if lengths[-1] is None else ''}{needed}. Change one of the two."
        )
    return order


def _cosine(share: float) -> float:
    """Return half a cosine wave: 1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
