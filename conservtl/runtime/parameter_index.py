"""What stands in an optimizer's groups, sorted once for what acts on it at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.pull import Pull, Pulled, gather
from conservtl.plan.decision import Moving, Update
from conservtl.plan.row import Row

__all__ = ["ParameterIndex"]


class ParameterIndex:
    """The parameters in an optimizer's groups with their rows and anchors.

    What it hands out is kept until a group, a parameter, its memory, what is trained or where anchors lie is
    another: looking takes some ten microseconds a step, sorting anew a hundred times that.

    Args:
        optimizer: its groups carry ``param_names``.
        rows: by name.
        frozen: names frozen in the current phase, an object that is replaced when they change.
        anchor: (name, parameter) -> where it is pulled to, as its row says it is held.
        importance: (name, parameter) -> what weighs the pull of each of its elements, or None.
        placed: an object that is replaced when anchors have to be asked for again.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rows: Mapping[str, Row],
        frozen: Callable[[], frozenset[str]],
        anchor: Callable[[str, Tensor], Tensor],
        importance: Callable[[str, Tensor], Tensor | None],
        placed: Callable[[], object],
    ) -> None:
        self._optimizer, self._rows = optimizer, rows
        self._frozen, self._anchor, self._importance, self._placed = frozen, anchor, importance, placed
        self._seen: tuple[list[Any], list[int], list[bool]] = ([], [], [])
        self._pulls: dict[str, list[Pull]] = {}
        self._moving: dict[str, list[Moving]] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """By name, because what prepares a model for many processes replaces the tensors in the groups."""
        for group in self._optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                yield name, parameter, group

    def pulls(self, mode: str) -> list[Pull]:
        """What is pulled in this way."""
        self._look()
        if mode not in self._pulls:
            self._pulls[mode] = gather(self._pulled(mode))
        return self._pulls[mode]

    def moving(self, update: Update) -> list[Moving]:
        """What an update acts on."""
        self._look()
        found = self._moving.get(update.name)
        if found is None:
            found = list(self._moved(update))
            if not any(self._rows[item.name].anchor == "cpu" for item in found):  # else they would stay on the device
                self._moving[update.name] = found
        return found

    def _look(self) -> None:
        """Forget what was sorted before something changed."""
        groups = self._optimizer.param_groups
        parameters = list(chain.from_iterable(group["params"] for group in groups))
        objects = [self._frozen(), self._placed(), *groups, *parameters]
        places = list(map(torch.Tensor.data_ptr, parameters))
        trained = list(map(attrgetter("requires_grad"), parameters))
        before, *facts = self._seen
        same = len(objects) == len(before) and all(map(is_, objects, before)) and facts == [places, trained]
        if same and 0 not in places:  # a sharded tensor does not say where its shard lies
            return
        self._seen = objects, places, trained
        self._pulls, self._moving = {}, {}

    def _trained(self) -> Iterator[tuple[Row, Tensor, dict[str, Any]]]:
        frozen = self._frozen()
        for name, parameter, group in self:
            row = self._rows.get(name)  # a group of the user's own is none of ours
            if row is not None and name not in frozen and parameter.requires_grad:
                yield row, parameter, group

    def _pulled(self, mode: str) -> Iterator[Pulled]:
        for row, parameter, group in self._trained():
            own = group if mode == "decoupled" else None  # so that one call serves all rates when coupled
            if row.mode != mode:
                continue
            if row.pull:
                anchor, importance = self._anchor(row.name, parameter), self._importance(row.name, parameter)
                yield Pulled(parameter, anchor, row.pull, own, importance, row.anneal)
            elif row.decay:
                yield Pulled(parameter, None, row.decay, own)

    def _moved(self, update: Update) -> Iterator[Moving]:
        wanted = set(update.names)
        for row, parameter, group in self._trained():
            if row.name in wanted:
                asked = type(update).anchors and row.origin == "source"
                anchor = self._anchor(row.name, parameter).to(parameter.device) if asked else None
                yield Moving(row.name, parameter, anchor, group)
