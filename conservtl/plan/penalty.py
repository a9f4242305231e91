"""Penalties on weights: decisions with a value and a gradient, L2-SP for example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import SerializeAsAny
from torch import Tensor

from conservtl.bounds import Count
from conservtl.errors import SpecError
from conservtl.plan.decision import Decision
from conservtl.plan.row import Anneal, Row
from conservtl.plan.update import Moving

__all__ = ["Penalties", "Penalty", "PenaltyKernel"]


class PenaltyKernel(Protocol):
    """A penalty prepared for a list of parameters, for as many steps as their tensors stay; called without autograd."""

    def add_gradients(self, factor: float, scale: Tensor | None) -> None:
        """Add factor × scale × the penalty's gradient to each parameter's gradient.

        Args:
            factor: of the annealing, negative if the optimizer maximises.
            scale: scalar tensor, the factor that the gradients still carry; None: 1.
        """

    def move_weights(self, factor: float, skip: Tensor | None) -> None:
        """Subtract rate × factor × the penalty's gradient from each parameter.

        Args:
            factor: of the annealing.
            skip: scalar tensor, non-zero if the step will be skipped; read on the device. None: never skipped.
        """


class Penalty(Decision):
    r"""A penalty on weights, added to the gradients of each step or a step of its own.

    A subclass implements ``value``, and ``gradient`` if it is quicker than automatic differentiation. The library does
    the rest: loss scales, optimizers that maximise, missing and sparse gradients, accumulation, closures, skipped
    steps, clipping (``adaptation.pull()``), annealing, sharded parameters, half-precision and CPU anchors. The
    optimizer's own weight decay is 0 on its parameters.

    Example:
        >>> import conservtl as ctl
        >>> from conservtl.plan import Penalty
        >>> class Huber(Penalty):
        ...     kind: Literal["huber_example"] = "huber_example"
        ...     strength: float
        ...     def describe(self):
        ...         return f"Huber penalty of {self.strength:g} on {len(self.names)} parameters"
        ...     def value(self, moving):
        ...         return self.strength * sum(
        ...             torch.nn.functional.huber_loss(item.parameter, item.anchor, reduction="sum") for item in moving
        ...         )
        >>> class HuberStrategy(ctl.Strategy):
        ...     kind: Literal["huber_example"] = "huber_example"
        ...     def apply(self, plan):
        ...         names = tuple(row.name for row in plan.rows if row.origin == "source")  # fresh ones have no anchor
        ...         return plan.with_penalty(Huber(by=self.label, names=names, strength=0.1))
        >>> source, model = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> ctl.adapt(model, source, [HuberStrategy()]).plan.penalties[0].names
        ('weight', 'bias')
    """

    names: tuple[str, ...]
    """Parameters it acts on, while they are trained."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """coupled: part of the gradient. decoupled: a step of its own, rate × gradient, before the gradient step."""
    anneal: Anneal | None = None
    """Factor on the penalty over the steps; None: 1."""
    every: Count = 1
    """Steps from one act to the next, which has the strength of all of them: times this if coupled; decoupled, a share
    s of the way to the target becomes 1 - (1 - s)^every. A step that a scaler skips counts if the optimizer is fused,
    because the host does not hear of it."""
    anchor: Literal["fp32", "bf16", "cpu"] = "fp32"
    """Storage of the starting values. fp32: on the device, as the parameters. bf16: in half the memory. cpu: sent to
    the device at each step."""
    reads: tuple[str, ...] = ()
    """Names of the measurements it reads. Each holds, for every parameter of ``names``, a finite tensor of its shape
    with values of at least 0: the Fisher information, for example."""

    column: ClassVar[Literal["pull", "decay"] | None] = None
    """Column of the plan that holds its strength on each parameter (``item.row.pull``); None: no column does."""
    anchors: ClassVar[bool] = True
    """Whether it needs the starting values; if not, ``Moving.anchor`` is None and costs no memory. Fresh parameters
    have none: leave their rows out of ``names`` (``row.origin == "source"``), or handle an anchor of None."""
    sums_over: ClassVar[Literal["elements", "rows", "parameters", "all"]] = "all"
    """Parts over which the value is a sum. all: ``value`` receives all parameters at once. parameters: it receives a
    few at a time, which saves memory. rows, elements: it also receives this process's rows, or elements, of sharded
    parameters (FSDP2), which are refused for the other two."""

    @abstractmethod
    def value(self, moving: Sequence[Moving]) -> Tensor:
        """Return the penalty, a scalar with its strength in it, differentiable with respect to ``item.parameter``.

        Args:
            moving: parameters, anchors (on the same device, of the same type) and measurements.
        """

    def gradient(self, moving: Sequence[Moving]) -> list[Tensor]:
        """Return the gradient of ``value`` with respect to each parameter; by default by automatic differentiation."""
        with torch.enable_grad():
            leaves = [item.parameter.detach().requires_grad_() for item in moving]
            value = self.value([replace(item, parameter=leaf) for item, leaf in zip(moving, leaves, strict=True)])
            if not isinstance(value, Tensor) or value.ndim:
                received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise SpecError(f"{self.by}: value() must return a scalar tensor; received {received}. Sum it.")
            if not value.requires_grad:  # constant on these parameters
                return [torch.zeros_like(leaf) for leaf in leaves]
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]

    def strength_on(self, row: Row) -> float | None:
        """Return the strength on a parameter: rate × strength above 1 is refused if decoupled. None: unknown."""
        return None if self.column is None else getattr(row, self.column)

    def pull_on(self, row: Row) -> float | None:  # noqa: ARG002
        """Return the strength that the plan's table shows as the pull on a parameter without one in its row."""
        return None

    def kernels(self, moving: Sequence[Moving]) -> Sequence[PenaltyKernel] | None:  # noqa: ARG002
        """Return kernels that apply the penalty to ``moving``; None: the generic kernel, which calls ``gradient``.

        Args:
            moving: parameters, sharded or not; anchors in the storage that ``anchor`` names.
        """
        return None


Penalties = tuple[SerializeAsAny[Penalty], ...]
