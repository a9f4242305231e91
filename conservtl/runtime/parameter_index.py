"""Cached lookup from an optimizer's parameters to what acts on them at each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conservtl.kernels.dtensor import local
from conservtl.kernels.gradient import GradientKernel
from conservtl.plan.penalty import Penalty, PenaltyKernel
from conservtl.plan.row import Row
from conservtl.plan.update import Moving, Prepared, Update
from conservtl.runtime.model_check import check_precision

if TYPE_CHECKING:
    from conservtl.runtime.bound_plan import BoundPlan

__all__ = ["ParameterIndex", "penalised"]


class ParameterIndex:
    """The parameters in an optimizer's groups, by name, with the kernels and lists that act on them.

    Kernels and lists are cached until a group, a parameter, its memory, its ``requires_grad`` or the context's
    revision changes. A step compares once, at the beginning of the block that it is the context of: building them anew
    takes a hundred times as long.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, context: BoundPlan) -> None:
        self._optimizer, self._context = optimizer, context
        self._planned = len(optimizer.param_groups)  # groups that follow hold parameters outside the model
        self._revision = -1
        self._seen: tuple[list[Any], list[int], list[bool]] = ([], [], [])
        self._memory: list[Tensor] = []  # kept, so that no other tensor comes to lie there: equal places, equal types
        self._blocks = 0  # inside which changes are not looked for
        self.places = 0
        """A number that grows whenever a group, a parameter or its memory changes, its type included."""
        self._kernels: dict[str, Sequence[PenaltyKernel]] = {}
        self._moving: dict[str, list[Moving]] = {}
        self._frozen: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """By name, because what prepares a model for many processes replaces the tensors in the groups."""
        for group in self._optimizer.param_groups[: self._planned]:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                yield name, parameter, group

    def __enter__(self) -> None:
        """Look for changes now, and for no others until the block ends."""
        self._refresh()
        self._blocks += 1

    def __exit__(self, *_: object) -> None:
        self._blocks -= 1

    def kernels(self, penalty: Penalty) -> Sequence[PenaltyKernel]:
        """Return the kernels of a penalty, for the parameters it acts on that are trained now."""
        if not self._blocks:
            self._refresh()
        if penalty.name not in self._kernels:
            self._kernels[penalty.name] = self._build(penalty)
        return self._kernels[penalty.name]

    def moving(self, update: Update) -> list[Moving]:
        """Return the parameters that an update acts on."""
        if not self._blocks:
            self._refresh()
        moving = self._moving.get(update.name)
        if moving is None:
            storage = {name: one.anchor for one in self._context.plan.penalties for name in one.names}
            moving = [self._moved(update, *one, storage.get(one[0].name)) for one in self._trained(update)]
            if "cpu" not in map(storage.get, update.names):  # else the copies would stay on the device
                self._moving[update.name] = moving = Prepared(moving)
        return moving

    def frozen(self) -> list[Tensor]:
        """Return the parameters that this phase does not train."""
        if not self._blocks:
            self._refresh()
        if self._frozen is None:
            frozen = self._context.frozen
            self._frozen = [parameter for name, parameter, _ in self if name in frozen] if frozen else []
        return self._frozen

    def _refresh(self) -> None:
        """Drop what was built before something changed."""
        groups = self._optimizer.param_groups
        parameters = list(chain.from_iterable(group["params"] for group in groups))
        objects = [*groups, *parameters]
        places = list(map(torch.Tensor.data_ptr, parameters))
        if 0 in places:  # a shard hides its place
            places = [
                local(one).data_ptr() if place == 0 else place for one, place in zip(parameters, places, strict=True)
            ]
        trained = list(map(_requires_grad, parameters))
        before, places_before, trained_before = self._seen
        same = places == places_before and len(objects) == len(before) and all(map(is_, objects, before))
        if same and trained == trained_before and self._revision == self._context.revision:
            return
        if not same:
            self._memory = [local(parameter).detach() for parameter in parameters]
            self.places += 1
        self._revision = self._context.revision
        self._seen = objects, places, trained
        self._kernels, self._moving, self._frozen = {}, {}, None

    def _trained(self, acting: Update | Penalty) -> Iterator[tuple[Row, Tensor, dict[str, Any]]]:
        """Return the parameters that it acts on and that are trained now; a group of the user's own has none."""
        wanted = set(acting.names) - self._context.frozen
        for name, parameter, group in self:
            if name in wanted and parameter.requires_grad:
                check_precision(acting, name, parameter)  # the model may have been converted since
                yield self._context.plan[name], parameter, group

    def _build(self, penalty: Penalty) -> Sequence[PenaltyKernel]:
        moving = [penalised(penalty, self._context, *one) for one in self._trained(penalty)]
        if not moving:
            return ()
        kernels = penalty.kernels(moving)
        return (GradientKernel(penalty, moving),) if kernels is None else kernels

    def _moved(self, update: Update, row: Row, parameter: Tensor, group: dict[str, Any], storage: str | None) -> Moving:
        if not type(update).anchors or row.origin != "source":
            return Moving(row, parameter, None, group)
        anchors = self._context.anchors
        anchor = anchors.of(row.name, parameter, storage or "fp32")
        return Moving(row, parameter, anchor.to(parameter.device), group, new=anchors.mask_of_new(row.name, parameter))


_requires_grad = attrgetter("requires_grad")


def penalised(penalty: Penalty, context: BoundPlan, row: Row, parameter: Tensor, group: dict[str, Any]) -> Moving:
    """Return a parameter as a penalty receives it: its anchor stored as the penalty says, and its measurements.

    Plain L2 on a parameter with new rows gets an anchor too: 0 on these rows, and the parameter itself on the others.
    """
    anchors, anchor = context.anchors, None
    if type(penalty).anchors and row.origin == "source":
        anchor = anchors.of(row.name, parameter, penalty.anchor)
    elif row.new_rows and penalty.column == "decay":
        anchor = anchors.zero_on_new(row.name, parameter)
    if not context.measured.keys() >= set(penalty.reads):
        context.check_measured()
    measured = {name: anchors.weighing(name, context.measured[name], row.name, parameter) for name in penalty.reads}
    return Moving(row, parameter, anchor, group, measured)
