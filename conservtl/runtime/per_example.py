"""Sums of the squared gradients of single examples, which the square of a batch's gradient is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from conservtl.batches import replace_tensors, row_count, tensors_of

__all__ = ["ModelValue", "PerExample"]

_ELEMENTS = 1 << 26  # most elements of gradients at once
_MOST = 64  # most examples at once; more bring nothing on a CPU
_SLOW = "There is a performance drop because we have not yet implemented the batching rule"

Value = Callable[[nn.Module, Any], Tensor]


class PerExample:
    """Sums of squared gradients, many examples at a time, or one at a time if ``vmap`` refuses the model.

    ``vmap`` refuses models that write into their inputs, branch on values, or have custom kernels.

    Args:
        model: in eval mode.
        parameters: canonical name -> parameter to differentiate with respect to.
        value: (model, batch of one) -> scalar.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], value: Value) -> None:
        self._model, self._parameters, self._value = model, dict(parameters), value
        raw = {id(parameter): name for name, parameter in model.named_parameters()}
        self._raw = {f"model.{raw[id(parameter)]}": name for name, parameter in self._parameters.items()}
        self._whole = ModelValue(model, value)
        elements = sum(parameter.numel() for parameter in self._parameters.values())
        self._chunk = max(1, min(_MOST, _ELEMENTS // max(1, elements)))
        self._batched = self._chunk > 1
        # cuDNN's recurrent layers have no backward in eval mode; torch's have.
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())

    def squares(self, batch: Any, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return the sum over a batch's examples of weight × squared gradient, by canonical name.

        Args:
            batch: its tensors have one row per example; scalars are shared.
            weights: (N,), one per example; None: 1.

        Raises:
            SpecError: a tensor has another number of rows.
        """
        size = row_count(batch)
        weights = torch.ones(size) if weights is None else weights
        total = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        for start in range(0, size, self._chunk):
            rows = slice(start, min(start + self._chunk, size))
            part = replace_tensors(batch, [t[rows] if t.ndim else t for t in tensors_of(batch)]) if size > 1 else batch
            with self._kernels():
                sums = self._together(part, weights[rows]) if self._batched and size > 1 else None
                for name, square in (self._one_by_one(part, weights[rows]) if sums is None else sums).items():
                    total[name] += square
        return total

    def _kernels(self) -> AbstractContextManager[Any]:
        if not (self._recurrent and torch.cuda.is_available()):
            return nullcontext()
        context: AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=False)
        return context

    @torch.no_grad()
    def _together(self, part: Any, weights: Tensor) -> dict[str, Tensor] | None:
        """Return the sums of all examples in one pass; None if ``vmap`` refuses the model."""
        tensors = tensors_of(part)

        def value_of(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
            content = replace_tensors(
                part, [row[None] if t.ndim else row for row, t in zip(rows, tensors, strict=True)]
            )
            value: Tensor = functional_call(self._whole, parameters, (content,))
            return value

        places = tuple(0 if tensor.ndim else None for tensor in tensors)
        parameters: dict[str, Tensor] = {raw: self._parameters[name].detach() for raw, name in self._raw.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=_SLOW)
                gradients = vmap(grad(value_of), in_dims=(None, *places))(parameters, *tensors)
        except Exception:  # noqa: BLE001 - vmap may fail in any way; an error of the model itself is raised again one by one
            self._batched = False
            return None
        return {
            self._raw[raw]: torch.einsum("n,n...->...", weights.to(gradient), gradient.square())
            for raw, gradient in gradients.items()
        }

    def _one_by_one(self, part: Any, weights: Tensor) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        tensors, size = tensors_of(part), len(weights)
        for index, weight in enumerate(weights):
            rows = [t[index : index + 1] if t.ndim else t for t in tensors]
            value = self._value(self._model, replace_tensors(part, rows) if size > 1 else part)
            gradients = torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight.to(gradient) * gradient.to_dense().square()
        return total


class ModelValue(nn.Module):
    """A function of a model and a batch as a module, whose parameters can be replaced for one call.

    Args:
        model: its parameters are named ``model.NAME``.
        value: (model, batch) -> scalar.
    """

    def __init__(self, model: nn.Module, value: Value) -> None:
        super().__init__()
        self.model = model
        self._value = value

    def forward(self, batch: Any) -> Tensor:
        """Return the value of a batch."""
        return self._value(self.model, batch)
