"""Starting values of parameters and buffers: kept on the CPU, and placed as a step needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.kernels.dtensor import place_like, real_parts, sharded, whole
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.plan.plan import Plan

__all__ = ["Anchors", "differs"]


class Anchors:
    """Starting values by name: those that training can change on the CPU, and copies placed like the parameters.

    A parameter that is frozen throughout has no copy: the model itself holds its starting value.

    Args:
        model: right after the transfer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers = {canonical(name): _copied(buffer) for name, buffer in unwrap(model).named_buffers()}
        self.placed: dict[tuple[str, str], Tensor] = {}
        self.revision = 0

    def keep(self, model: nn.Module, plan: Plan) -> None:
        """Keep the starting values of what a plan trains in some phase, and no others.

        Args:
            model: at its starting point, but for parameters whose values are kept already.
            plan: says what came from the source and what is trained.
        """
        parameters = named_parameters(model)
        names = [name for name in plan.trained if plan[name].origin == "source"]
        kept = self.parameters
        self.parameters = {name: kept[name] if name in kept else _copied(parameters[name]) for name in names}
        self.forget()

    def start(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """Return the starting values on the CPU of all parameters from the source.

        If parameters are sharded, all processes call it together.
        """
        parameters = named_parameters(model)
        names = [row.name for row in plan.rows if row.origin == "source"]
        kept = self.parameters
        return {name: kept[name] if name in kept else _copied(whole(parameters[name])) for name in names}

    def of(self, name: str, parameter: Tensor, storage: str) -> Tensor:
        """Return the starting value of a parameter: on the CPU, or placed like the parameter.

        Args:
            name: of the parameter.
            parameter: as the model holds it.
            storage: fp32, bf16 or cpu, as in ``Penalty.anchor``.
        """
        start = self.parameters[name]
        if storage != "cpu":
            return self._place(storage, name, start, parameter, torch.bfloat16 if storage == "bf16" else None)
        if sharded(parameter):
            return place_like(start, parameter)
        if parameter.is_cuda and not start.is_pinned():
            start = self.parameters[name] = start.pin_memory()  # else the host would wait while it is sent
        return start

    def weighing(self, measure: str, found: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return a measurement of a parameter, placed like it."""
        return self._place(measure, name, found[name], parameter, None)

    def forget(self) -> None:
        """Drop all placed copies."""
        self.placed = {}
        self.revision += 1

    @torch.no_grad()
    def drift(self, plan: Plan, model: nn.Module) -> dict[str, float]:
        """Return |w - w0| / |w0| of each layer, over its parameters from the source."""
        parameters = named_parameters(model)
        drift = {}
        for layer, rows in plan.by_layer():
            weights = {row.name: whole(parameters[row.name]).cpu() for row in rows if row.origin == "source"}
            if weights:
                pairs = [(_wide(weight), _wide(self.parameters.get(name, weight))) for name, weight in weights.items()]
                moved = sum(float((w - w0).square().sum()) for w, w0 in pairs)
                size = sum(float(w0.square().sum()) for _, w0 in pairs)
                drift[layer] = (moved / size) ** 0.5 if size else float(moved > 0)
        return drift

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has the starting values that are kept here, of the same shapes."""
        shapes = {name: tensor.shape for name, tensor in state["start"].items()}
        return all(shapes.get(name) == tensor.shape for name, tensor in self.parameters.items())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters as ``start`` and buffers as ``statistics``."""
        return {"start": dict(self.parameters), "statistics": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; values in it of parameters that are frozen throughout are left to the model."""
        self.parameters = {name: _copied(state["start"][name]) for name in self.parameters}
        self.buffers = {name: _copied(tensor) for name, tensor in state["statistics"].items()}
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "placed": {}}

    def _place(self, what: str, name: str, value: Tensor, parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
        placed = self.placed.get((what, name))
        if placed is None or placed.device != parameter.device or placed.stride() != parameter.stride():
            placed = self.placed[what, name] = place_like(value, parameter, dtype)
        return placed


def differs(source: nn.Module, start: Mapping[str, Tensor]) -> str | None:
    """Return the first parameter of a source model that differs from the starting values by more than rounding."""
    for name, parameter in named_parameters(source).items():
        value = start.get(name)
        if value is None or value.shape != parameter.shape:
            continue
        if not torch.allclose(_wide(parameter.detach().cpu()), _wide(value), rtol=1e-2, atol=1e-6):
            return name
    return None


def _wide(tensor: Tensor) -> Tensor:
    return real_parts(tensor).double()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
