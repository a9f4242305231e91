"""Lightning under each of its names, and checks of its Trainer: callbacks and schedulers that would undo a plan."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.extras import require
from conservtl.runtime.rates_over_time import PlanScheduler

__all__ = ["PACKAGES", "check_callbacks", "check_schedulers"]


def _packages() -> list[Any]:
    """Return Lightning under each of its names that is installed: classes of one are foreign to the other's Trainer."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            found.append(importlib.import_module(name))
    return found or [require("lightning.pytorch", "lightning")]


PACKAGES = _packages()
_FINETUNING = tuple(package.callbacks.BaseFinetuning for package in PACKAGES)
_AVERAGING = tuple(package.callbacks.StochasticWeightAveraging for package in PACKAGES)


def check_callbacks(trainer: Any) -> None:
    """Raise if another callback freezes and unfreezes layers, which the plan does."""
    for callback in trainer.callbacks:
        if isinstance(callback, _FINETUNING):
            epochs = getattr(callback, "unfreeze_backbone_at_epoch", 10)
            raise SpecError(
                f"Conserve: the plan alone freezes and unfreezes layers, but {type(callback).__name__} does so too. "
                f"Leave it out, and adapt with GradualUnfreezing(epochs={epochs}), which trains the head first, and "
                "DiscriminativeLR for a lower rate below it."
            )


def check_schedulers(trainer: Any, adaptation: Adaptation) -> None:
    """Raise if a phase scales rates that a scheduler would set back, or averaging would make all rates equal."""
    for callback in trainer.callbacks:
        averages = isinstance(callback, _AVERAGING)
        rates = getattr(callback, "_swa_lrs", None)  # no public name says it
        groups = trainer.optimizers[0].param_groups
        if averages and isinstance(rates, float) and len({group["initial_lr"] for group in groups}) > 1:
            raise SpecError(
                f"Conserve: the plan gives layers rates of their own, and StochasticWeightAveraging(swa_lrs={rates:g}) "
                f"gives all the same. Pass a list with a rate for each of the {len(groups)} groups "
                f"({', '.join(str(group['name']) for group in groups)})."
            )
    if len({phase.scale for phase in adaptation.plan.phases}) == 1:
        return
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, PlanScheduler):
            name = type(config.scheduler).__name__
            raise SpecError(
                f"Conserve: the plan's phases scale the rates, and a {name} keeps those of the first phase. Make it "
                f"with self.adaptation.scheduler({name}, ...) in configure_optimizers."
            )
