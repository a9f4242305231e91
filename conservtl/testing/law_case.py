"""A case on which the laws of a training step are tried, and ordinary training of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.adaptation.adaptation import Adaptation
from conservtl.layers import named_parameters
from conservtl.testing.steps import use_eval_modules

__all__ = ["LawCase", "close", "largest", "weights"]


@dataclass(frozen=True)
class LawCase:
    """A strategy, a model and a batch on which the laws are tried.

    Args:
        label: name of the strategy, for messages.
        make: () -> an adaptation that can make an optimizer, the same at each call.
        rebuild: () -> the same adaptation, not yet measured, with any weights.
        objective: (adaptation, batch) -> the loss with the plan's terms, the mean over the batch.
        batch: a batch.
        parts: batches of equal sizes that make up ``batch``.
        doubled: the batch twice over; None: the law of the doubled batch is not tried.
        optimizer: class of the optimizer.
        options: arguments of the optimizer, ``lr`` among them.
        steps: number of training steps in each law.
    """

    label: str
    make: Callable[[], Adaptation]
    rebuild: Callable[[], Adaptation]
    objective: Callable[[Adaptation, Any], Tensor]
    batch: Any
    parts: Sequence[Any]
    doubled: Any = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "momentum": 0.9})
    steps: int = 3

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Weights before the first step."""
        return weights(self.make())

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """Weights after the steps of an ordinary loop."""
        return self.train()

    def train(self, **how: Any) -> dict[str, Tensor]:
        """Return the weights after the steps from the start; arguments as for ``step``."""
        adaptation = self.make()
        optimizer = adaptation.optimizer(self.optimizer, **self.options)
        for _ in range(self.steps):
            self.step(adaptation, optimizer, **how)
        return weights(adaptation)

    def step(
        self,
        adaptation: Adaptation,
        optimizer: torch.optim.Optimizer,
        *,
        parts: Sequence[Any] | None = None,
        scaler: GradScaler | None = None,
        clip: float | None = None,
        sign: float = 1.0,
    ) -> None:
        """Make one step on batches that are accumulated, with clipping of penalties and gradients together."""
        self.backward(adaptation, parts, sign=sign, scaler=scaler)
        if clip is not None:
            adaptation.pull(scaler)
            torch.nn.utils.clip_grad_norm_(adaptation.model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    def backward(
        self,
        adaptation: Adaptation,
        parts: Sequence[Any] | None = None,
        *,
        sign: float = 1.0,
        scaler: GradScaler | None = None,
    ) -> None:
        """Compute the gradients of the loss; arguments as for ``step``."""
        use_eval_modules(adaptation.model)
        batches = [self.batch] if parts is None else parts
        for batch in batches:
            loss = sign * self.objective(adaptation, batch) / len(batches)
            if loss.requires_grad:
                (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]


def weights(adaptation: Adaptation) -> dict[str, Tensor]:
    """Return a copy of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in named_parameters(adaptation.model).items()}


def close(first: Tensor, second: Tensor, size: float) -> bool:
    """Whether two tensors are equal up to rounding; numbers of ``size``, if larger, are those whose sum they are."""
    digits = torch.finfo(first.dtype).eps
    allowed: float = 16 * digits * max(1.0, largest(first)) + digits**0.6 * size
    return largest(first - second) <= allowed


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value of a tensor; 0 if it has no elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
