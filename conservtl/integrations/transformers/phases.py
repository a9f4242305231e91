"""Phases of a plan by the epochs of a Trainer, and their rates in its scheduler."""

from __future__ import annotations

from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.schedule import phase_of_epoch
from conservtl.extras import require

__all__ = ["PhaseCallback", "scale_scheduler"]

transformers: Any = require("transformers", "transformers")


class PhaseCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Begins each phase of a plan at its epoch.

    Args:
        adaptation: the model that is trained, with its plan.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self._phases: list[int] = []
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Give each epoch its phase."""
        self._phases = phase_of_epoch(self.adaptation.plan, state.num_train_epochs, "num_train_epochs")
        self._epoch = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the epoch's phase, unless a resumed run is in it."""
        # Counted, because an epoch that was stopped early leaves a fraction; a resumed run begins within one.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        phase = self._phases[self._epoch]
        if phase != self.adaptation.phase:
            self.adaptation.start_phase(phase)
            scale_scheduler(kwargs["lr_scheduler"])


def scale_scheduler(scheduler: Any) -> None:
    """Let a scheduler go on from the rates of the phase that has begun.

    A scheduler that computes each rate from the first one, as all of transformers' do but those that watch a metric,
    keeps these in ``base_lrs``; a phase has scaled the groups' ``initial_lr``.
    """
    optimizer = scheduler.optimizer
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for inner in getattr(scheduler, "_schedulers", ()):
        scale_scheduler(inner)
