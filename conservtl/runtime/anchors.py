"""Where parameters and buffers started, and that start as a step needs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.kernels.dtensor import place_like, sharded, whole
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.plan.plan import Plan

__all__ = ["Anchors", "differs"]


class Anchors:
    """The starting point by name, kept on the CPU, and placed like its parameter once a step asks for it.

    Args:
        model: right after the transfer.
        names: the parameters that came from the source.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.parameters = {n: _kept(p) for n, p in named_parameters(model).items() if n in names}
        self.buffers = {canonical(name): _kept(buffer) for name, buffer in unwrap(model).named_buffers()}
        self.placed: dict[tuple[str, str], Tensor] = {}
        self.revision = 0

    def of(self, name: str, parameter: Tensor, held: str) -> Tensor:
        """Where a parameter started: on the CPU, or placed as the parameter is."""
        start = self.parameters[name]
        if held != "cpu":
            return self._place(held, name, start, parameter, torch.bfloat16 if held == "bf16" else None)
        if sharded(parameter):
            return place_like(start, parameter)
        if parameter.is_cuda and not start.is_pinned():
            start = self.parameters[name] = start.pin_memory()  # else the host would wait while it is sent
        return start

    def weighing(self, measure: str, found: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """What was measured of a parameter, placed as it is."""
        return self._place(measure, name, found[name], parameter, None)

    def forget(self) -> None:
        """Place all anew when they are next asked for."""
        self.placed = {}
        self.revision += 1

    @torch.no_grad()
    def drift(self, plan: Plan, model: nn.Module) -> dict[str, float]:
        """|w - w0| / |w0| of each layer, over its parameters from the source."""
        parameters = named_parameters(model)
        found = {}
        for layer, rows in plan.by_layer():
            pairs = [(whole(parameters[r.name]).cpu(), self.parameters[r.name]) for r in rows if r.origin == "source"]
            if pairs:
                moved = sum(float((w.double() - w0.double()).square().sum()) for w, w0 in pairs)
                size = sum(float(w0.double().square().sum()) for _, w0 in pairs)
                found[layer] = (moved / size) ** 0.5 if size else float(moved > 0)
        return found

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has anchors for the same parameters, of the same shapes."""
        return {n: t.shape for n, t in state["start"].items()} == {n: t.shape for n, t in self.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Parameters as ``start`` and buffers as ``statistics``."""
        return {"start": dict(self.parameters), "statistics": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.parameters = {name: _kept(tensor) for name, tensor in state["start"].items()}
        self.buffers = {name: _kept(tensor) for name, tensor in state["statistics"].items()}
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "placed": {}}

    def _place(self, what: str, name: str, value: Tensor, parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
        placed = self.placed.get((what, name))
        if placed is None or placed.device != parameter.device or placed.stride() != parameter.stride():
            placed = self.placed[what, name] = place_like(value, parameter, dtype)
        return placed


def differs(source: nn.Module, start: Mapping[str, Tensor]) -> str | None:
    """The first parameter of a source model that is not where an adaptation of it started, but for rounding."""
    for name, parameter in named_parameters(source).items():
        value = start.get(name)
        if value is None or value.shape != parameter.shape:
            continue
        if not torch.allclose(parameter.detach().float().cpu(), value.float(), rtol=1e-2, atol=1e-6):
            return name
    return None


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
