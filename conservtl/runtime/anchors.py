"""Starting values of parameters and buffers: kept on the CPU, and placed as a step needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.kernels.dtensor import from_part, local, part_of, place_like, real_parts, sharded, whole
from conservtl.kernels.low_rank import squared_change
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.plan.plan import Plan
from conservtl.source.by_label import row_mask, rows_by_label

__all__ = ["Anchors", "differs"]

_Placing = Callable[[Tensor, Any, torch.dtype | None], Tensor]


class Anchors:
    """Starting values by name: those that training can change on the CPU, and copies placed like the parameters.

    A parameter that is frozen throughout has no copy: the model itself holds its starting value. Of parameters that
    ``shard`` found sharded, each process keeps the starting values of its own part.

    New rows of a parameter whose others are copied (a label that the source does not know) have no starting value.
    Their anchor follows the parameter, so that they deviate from it by nothing: no penalty and no update pulls them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers = {canonical(name): _copied(buffer) for name, buffer in unwrap(model).named_buffers()}
        self.added: dict[str, Tensor] = {}
        """First values of parameters that strategies added to the model."""
        self.new: dict[str, tuple[int, ...]] = {}
        self.placed: dict[tuple[str, str], Tensor] = {}
        self._following: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        self._cut: set[str] = set()  # names of which only this process's part is kept
        self.revision = 0

    def keep(self, model: nn.Module, plan: Plan) -> None:
        """Keep the starting values of what a plan trains in some phase, and no others."""
        parameters = named_parameters(model)
        names = [name for name in plan.trained if plan[name].origin == "source"]
        kept = self.parameters
        self.parameters = {name: kept[name] if name in kept else _copied(parameters[name]) for name in names}
        self.new = {row.name: row.new_rows for row in plan.rows if row.new_rows}
        added = [row.name for row in plan.rows if row.added and row.name not in self.added]
        self.added |= {name: _copied(parameters[name]) for name in added}
        self.forget()

    def shard(self, model: nn.Module) -> None:
        """Keep of each sharded parameter the part that this process holds, instead of the whole starting value."""
        parameters = named_parameters(model)
        for name in [name for name in self.parameters if sharded(parameters[name]) and name not in self._cut]:
            start = self.parameters[name]
            self.parameters[name] = part_of(place_like(start, parameters[name], start.dtype))
            self._cut.add(name)
        self.forget()

    def gather(self, model: nn.Module) -> None:
        """Keep whole starting values again; all processes call it together, before the parameters are whole again."""
        parameters = named_parameters(model)
        self.parameters = {name: self._whole(name, parameters[name]) for name in self.parameters}
        self._cut = set()
        self.forget()

    def start(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """Return the starting values on the CPU of all parameters from the source; new rows as they are now.

        Factors B of low rank, which start at 0, are among them: where they are 0 the weights are the source's.

        If parameters are sharded, all processes call it together.
        """
        parameters = named_parameters(model)
        names = [row.name for row in plan.rows if row.origin == "source"]
        kept = self.parameters
        start = {
            name: self._whole(name, parameters[name]) if name in kept else _copied(whole(parameters[name]))
            for name in names
        }
        for name in (name for name in names if name in self.new and name in kept):
            now = _copied(whole(parameters[name]))
            start[name] = torch.where(row_mask(now.shape, self.new[name]), now, start[name])
        factors = [row for row in plan.rows if row.low_rank is not None]
        return start | {row.name: torch.zeros(row.shape, dtype=parameters[row.name].dtype) for row in factors}

    def of(self, name: str, parameter: Tensor, storage: str) -> Tensor:
        """Return the starting value of a parameter, on the CPU or placed like it, as ``storage`` says."""
        start = self.parameters[name]
        if name in self.new:  # whatever the storage: rounded values would not follow exactly
            return self._follow("w0", name, start, parameter, row_mask(parameter.shape, self.new[name]))
        if storage != "cpu":
            return self._place(storage, name, start, parameter, torch.bfloat16 if storage == "bf16" else None)
        if sharded(parameter):
            return self._placing(name)(start, parameter, None)
        if parameter.is_cuda and not start.is_pinned():
            start = self.parameters[name] = start.pin_memory()  # else the host would wait while it is sent
        return start

    def zero_on_new(self, name: str, parameter: Tensor) -> Tensor:
        """Return the target of plain L2 on a parameter's new rows, placed like it: 0 there, and the rest follows it."""
        zero = torch.zeros_like(self.parameters[name])
        return self._follow("zero", name, zero, parameter, ~row_mask(parameter.shape, self.new[name]))

    def follow(self) -> None:
        """Let the anchors of rows without a starting value follow their parameters, which have changed."""
        for anchor, parameter, rows in self._following.values():
            anchor.copy_(torch.where(rows, local(parameter.detach()), anchor))

    def mask_of_new(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return which elements of a parameter are of new rows, on its device; of a sharded one this process's part."""
        if name not in self.new:
            return None
        rows = row_mask(parameter.shape, self.new[name]).expand(parameter.shape)
        mask: Tensor = local(self._place("new", name, rows, parameter, None, place_like))
        return mask != 0

    def _follow(self, what: str, name: str, start: Tensor, parameter: Tensor, rows: Tensor) -> Tensor:
        """Return an anchor that follows the parameter where ``rows`` is true."""
        anchor = self._place(what, name, start, parameter, None)
        mask = self._place(f"{what} rows", name, rows.expand(parameter.shape), parameter, None, place_like)
        self._following[what, name] = local(anchor), parameter, local(mask) != 0
        self.follow()
        return anchor

    def weighing(self, measure: str, tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return a measurement of a parameter, placed like it."""
        return self._place(measure, name, tensors[name], parameter, None, place_like)

    def forget(self) -> None:
        """Drop all placed copies."""
        self.placed, self._following = {}, {}
        self.revision += 1

    @torch.no_grad()
    def drift(self, plan: Plan, model: nn.Module) -> dict[str, float]:
        """Return |w - w0| / |w0| of each layer, over its parameters from the source, changes of low rank included."""
        parameters = named_parameters(model)
        drift = {}
        for layer, rows in plan.by_layer():
            weights = {row.name: whole(parameters[row.name]).cpu() for row in rows if row.origin == "source"}
            changes = [(row.name, row.low_rank) for row in rows if row.low_rank is not None]
            if weights:
                starts = {
                    name: self._whole(name, parameters[name]) if name in self.parameters else weight
                    for name, weight in weights.items()
                }
                pairs = [
                    (self._copied_rows(name, weights[name]), self._copied_rows(name, starts[name])) for name in weights
                ]
                moved = sum(float((w - w0).square().sum()) for w, w0 in pairs)
                for b, change in changes:  # their weights have not moved themselves
                    first, second = (whole(parameters[name]).double() for name in (change.a, b))
                    moved += float(squared_change(first, second, change.scale))
                size = sum(float(w0.square().sum()) for _, w0 in pairs)
                drift[layer] = (moved / size) ** 0.5 if size else float(moved > 0)
        return drift

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has the starting values that are kept here, of the same shapes."""
        shapes = {name: tensor.shape for name, tensor in state["start"].items()}
        return all(
            name in shapes and (name in self._cut or shapes[name] == tensor.shape)
            for name, tensor in self.parameters.items()
        )

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return parameters as ``start`` and buffers as ``statistics``, whole; all processes call it if sharded."""
        parameters = named_parameters(model) if self._cut else {}
        start = {name: self._whole(name, parameters.get(name)) for name in self.parameters}
        return {"start": start, "statistics": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Restore a state; values in it of parameters that are frozen throughout are left to the model."""
        self.parameters = {name: _copied(state["start"][name]) for name in self.parameters}
        self.buffers = {name: _copied(tensor) for name, tensor in state["statistics"].items()}
        self._cut = set()
        self.shard(model)

    def _copied_rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in double precision, with 0 for new rows."""
        wide = _wide(tensor)
        return wide.masked_fill(row_mask(wide.shape, self.new[name]), 0) if name in self.new else wide

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "placed": {}, "_following": {}}

    def _whole(self, name: str, parameter: Any) -> Tensor:
        """Return a starting value on the CPU, put together from all parts if only this process's is kept."""
        start = self.parameters[name]
        return whole(from_part(start, parameter, start.dtype)).cpu() if name in self._cut else start

    def _placing(self, name: str) -> _Placing:
        """Return the function that places what is kept of a starting value."""
        return from_part if name in self._cut else place_like

    def _place(
        self,
        what: str,
        name: str,
        value: Tensor,
        parameter: Tensor,
        dtype: torch.dtype | None,
        placing: _Placing | None = None,
    ) -> Tensor:
        """Return a tensor placed like a parameter, kept for later calls; ``placing`` None: it is a starting value."""
        placed = self.placed.get((what, name))
        if placed is None or placed.device != parameter.device or placed.stride() != parameter.stride():
            placed = self.placed[what, name] = (placing or self._placing(name))(value, parameter, dtype)
        return placed


def differs(source: nn.Module, start: Mapping[str, Tensor], plan: Plan) -> str | None:
    """Return the first parameter of a source model that differs from the starting values by more than rounding."""
    for name, parameter in named_parameters(source).items():
        value, given = start.get(name), parameter.detach().cpu()
        if value is not None and name in plan and (numbers := plan[name].source_rows) is not None:
            given = rows_by_label(given, numbers)
            value = value.masked_fill(row_mask(value.shape, plan[name].new_rows), 0)
        if value is None or value.shape != given.shape:
            continue
        if not torch.allclose(_wide(given), _wide(value), rtol=1e-2, atol=1e-6):
            return name
    return None


def _wide(tensor: Tensor) -> Tensor:
    return real_parts(tensor).double()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
