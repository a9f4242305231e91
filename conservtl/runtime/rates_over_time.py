"""Rates over time in any loop: scaled by phases, and a scheduler of torch under which they keep their ratios."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from conservtl.compat import forget_schedulers, has_scheduler
from conservtl.errors import OmissionWarning, SpecError

__all__ = ["PhaseRates", "PlanScheduler"]


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


_CYCLED = ("momentum", "betas")
"""Fields beside the rate that OneCycleLR and CyclicLR change."""


class PlanScheduler(LRScheduler):
    """A scheduler that acts on one rate, of which every group keeps its ratio.

    Schedulers with a bound of their own (``max_lr``, ``eta_min``) give all groups of an optimizer the same rate, and
    all of them keep the rates of the phase that they were made in. Here the scheduler sees an optimizer with a single
    group at the optimizer's own rate, and each real group takes ``initial_lr`` times what became of that rate:

        lr of a group = initial_lr of the group * scheduled rate / optimizer's rate

    ``start_phase`` scales ``initial_lr``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, cls: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if not callable(cls):
            raise SpecError(
                "scheduler() makes the scheduler: pass the class and its arguments, such as "
                "scheduler(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=100); received an instance of "
                f"{type(cls).__name__}."
            )
        self.optimizer = optimizer
        self._base = float(optimizer.defaults["lr"])
        self._pattern = _with_one_group(optimizer)
        self._inner = cls(self._pattern, *args, **options)
        self._step_count = 1
        self._apply()

    def step(self, *args: Any, **options: Any) -> None:
        """Go on by a step; arguments as for the scheduler's own ``step``, such as the metric of ReduceLROnPlateau."""
        self._pattern.step()  # without gradients nothing moves; schedulers warn if no step came before theirs
        self._inner.step(*args, **options)
        self._step_count += 1
        self._apply()

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's own state, and the rate that it has come to."""
        return {"scheduler": self._inner.state_dict(), "group": _settings(self._pattern.param_groups[0])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self._inner.load_state_dict(state_dict["scheduler"])
        self._pattern.param_groups[0].update(state_dict["group"])
        self._apply()

    def _apply(self) -> None:
        """Give each group its share of the scheduled rate."""
        (pattern,) = self._pattern.param_groups
        factor = float(pattern["lr"]) / self._base
        self.last_epoch = getattr(self._inner, "last_epoch", self._step_count - 1)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # one of parameters outside the model
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            group.update({name: pattern[name] for name in _CYCLED if name in group})


def _with_one_group(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer with one group of the given one's settings, at its own rate, which moves nothing."""
    pattern = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=float(optimizer.defaults["lr"]))
    pattern.defaults = {**optimizer.defaults, "lr": pattern.defaults["lr"]}
    pattern.param_groups[0].update({k: v for k, v in optimizer.param_groups[0].items() if k in _CYCLED})
    return pattern


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
