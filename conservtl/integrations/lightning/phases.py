"""Phases of a plan over the epochs of a Trainer."""

from __future__ import annotations

from conservtl.engine.schedule import phase_of_epoch
from conservtl.errors import SpecError
from conservtl.plan.plan import Plan

__all__ = ["phases_of"]


def phases_of(plan: Plan, epochs: int | None) -> list[int]:
    """Return the phase of each epoch; without an end, the last phase goes on.

    Raises:
        SpecError: the phases do not fit the number of epochs.
    """
    phases = plan.phases
    if epochs is not None and epochs >= 0:
        try:
            return phase_of_epoch(plan, epochs)
        except SpecError as error:
            raise SpecError(str(error).replace("training.epochs", "Trainer(max_epochs=...)")) from None
    lengths = [phase.epochs for phase in phases[:-1] if isinstance(phase.epochs, int)]
    if len(lengths) < len(phases) - 1:
        raise SpecError(
            "Conserve: a phase lasts a share of the run, but Trainer(max_epochs=...) is not set. Set it, or give "
            "phases a number of epochs."
        )
    return [number for number, length in enumerate(lengths) for _ in range(length)] + [len(phases) - 1]
