"""A scheduler of torch for groups whose rates keep their ratios, over phases too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from conservtl.errors import SpecError

__all__ = ["PlanScheduler"]

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
