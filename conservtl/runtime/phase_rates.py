"""The rates of an optimizer's groups as phases scale them, and a scheduler that takes a phase's scale back."""

from __future__ import annotations

import warnings

import torch

from conservtl.compat import forget_schedulers, has_scheduler
from conservtl.errors import OmissionWarning

__all__ = ["PhaseRates"]


class PhaseRates:
    """Scales rates for a phase; warns once if a scheduler makes rates equal, or restores those of an earlier phase."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._planned = len(optimizer.param_groups)  # groups that follow hold parameters outside the model
        self._made = self._rates()  # until they change
        self._given: list[float] = []  # rates of a phase, until a scheduler changes them
        self._rises = False  # whether a return to the rates before is a rise

    def scale(self, scale: float) -> None:
        """Scale rates for a phase: the group records the scale of its own, which may have been loaded."""
        groups = self._optimizer.param_groups
        before = groups[0].get("phase_scale", scale)
        factors = [scale / group.get("phase_scale", before) for group in groups]
        for group, factor in zip(groups, factors, strict=True):
            first = group.get("initial_lr", group["lr"])
            group |= {"lr": group["lr"] * factor, "initial_lr": first * factor, "phase_scale": scale}
        if any(factor != 1 for factor in factors) and has_scheduler(self._optimizer):
            forget_schedulers(self._optimizer)
            self._given, self._rises = self._rates(), max(factors) < 1

    def check(self) -> None:
        """Warn if the first change of the rates since a phase began goes back, and no scheduler was made for it.

        Warn if the first change makes rates that differed all equal: OneCycleLR and CyclicLR set one for all groups.
        """
        rates, made = self._rates(), self._made
        if rates == made and not self._given:
            return
        if rates != made:
            self._made = []
        if len(set(made)) > 1 and len(set(rates)) == 1 and rates[0]:
            warnings.warn(
                f"a scheduler has made the rates of all groups equal ({rates[0]:g}), and the plan's differ: one with "
                "an absolute bound, such as OneCycleLR(max_lr=...), replaces them. Make it with "
                "adaptation.scheduler(...), which keeps their ratios.",
                OmissionWarning,
                stacklevel=6,  # the line that calls the optimizer's step
            )
        if not self._given:
            return
        if has_scheduler(self._optimizer):
            self._given = []
        elif rates != self._given:
            back = any(
                (now > given) if self._rises else (now < given) for now, given in zip(rates, self._given, strict=True)
            )
            self._given = []
            if back:
                warnings.warn(
                    "a scheduler made before start_phase(...) sets the rates of the earlier phase again: it keeps the "
                    "rates it was made with, and the phase scales them. Make it with adaptation.scheduler(...), which "
                    "goes on over phases, or make a new one after start_phase(...).",
                    OmissionWarning,
                    stacklevel=6,  # the line that calls the optimizer's step
                )

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups[: self._planned]]
