"""A head whose labels overlap the source's: its rows are copied by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SourceError, SpecError, counted
from conservtl.layers.names import named_modules
from conservtl.plan.plan import Plan

__all__ = ["HeadLabels", "row_mask", "rows_by_label"]

_SHOWN = 6  # labels in a note


class HeadLabels:
    """The labels of a head's outputs and of the source's, each list in the order of the outputs.

    Args:
        labels: of the target and of the source: text, numbers, or whatever else can be compared and hashed.

    Raises:
        SpecError: these are no two lists, one has no order or is empty, or a label stands twice in one.
    """

    def __init__(self, labels: Sequence[Sequence[Any]]) -> None:
        pair = isinstance(labels, Collection) and not isinstance(labels, (str, Mapping)) and len(labels) == 2
        if not pair or any(isinstance(one, str) or not isinstance(one, Iterable) for one in labels):
            raise SpecError(f"labels must be two lists, (target, source); received {labels!r:.80}. Give both.")
        if unordered := [one for one in labels if isinstance(one, (Mapping, AbstractSet))]:
            raise SpecError(
                f"labels must be in the order of the outputs; received a {type(unordered[0]).__name__}. Give a list of "
                "them, such as [id2label[i] for i in range(len(id2label))]."
            )
        self.target, self.source = (tuple(one.tolist() if hasattr(one, "tolist") else one) for one in labels)
        for name, found in (("target", self.target), ("source", self.source)):
            twice = [label for label, count in Counter(found).items() if count > 1]
            if twice or not found:
                received = f"{twice[0]!r} twice" if twice else "none"
                raise SpecError(
                    f"labels: each of the {name}'s must be listed once, in the order of the outputs; received "
                    f"{received}. List one for each output."
                )
        places = {label: place for place, label in enumerate(self.source)}
        self.numbers = tuple(places.get(label) for label in self.target)

    @property
    def shared(self) -> bool:
        """Whether both have the same labels in the same order, so that one head serves both."""
        return self.target == self.source

    @property
    def common(self) -> tuple[int, ...]:
        """Outputs of the target whose labels the source knows too."""
        return tuple(place for place, number in enumerate(self.numbers) if number is not None)

    def check_run(self, run: Mapping[str, Any] | None, where: str) -> None:
        """Raise unless the source's labels are those of the run that saved it."""
        if run is not None and list(map(str, self.source)) != list(map(str, run["labels"])):
            raise SourceError(
                f"{where} was saved by a run with the labels {_listed(run['labels'])}, and labels gives the source "
                f"{_listed(self.source)}. Give that run's labels, in its order."
            )

    def applied(self, plan: Plan, model: nn.Module, declared: Collection[str]) -> Plan:
        """Return the plan in which the head's rows are copied by label, before any strategy.

        Raises:
            SpecError: the head, or the source's, has not one row for each of its labels.
        """
        head = [plan[name] for name in plan.head]
        ours, theirs = len(self.target), len(self.source)
        modules = named_modules(model)
        weights = [row for row in head if row.kind == "weight"] or head
        if any(row.name in declared for row in weights):
            return plan
        for row in weights:
            columns = _by_columns(modules.get(row.name.rpartition(".")[0]))
            if row.shape[:1] != (ours,) or columns:
                raise SpecError(
                    f"labels: the head must have a row for each of the target's {counted(ours, 'label')}; {row.name!r} "
                    f"has shape {row.shape}{', with the outputs on another axis' * columns}. Correct the list or the "
                    "model, or declare the head fresh (fresh=['head'])."
                )
        other = [row for row in weights if row.source_shape is not None and row.source_shape[:1] != (theirs,)]
        if other:
            raise SpecError(
                f"labels: the source's head must have a row for each of its {counted(theirs, 'label')}; "
                f"{other[0].name!r} has "
                f"shape {other[0].source_shape} there. List the labels of the source's outputs."
            )
        if self.shared or not self.common:
            return plan
        rows = {
            row.name: self.numbers
            for row in head
            if row.name not in declared
            and row.source_shape is not None
            and (row.shape[:1], row.source_shape[:1]) == ((ours,), (theirs,))
            and row.shape[1:] == row.source_shape[1:]
        }
        for row in (row for row in weights if row.name in rows):
            if over := _normalised_together(modules, row.name):
                raise SpecError(
                    f"labels: rows of the head must not depend on each other; {row.name!r} is of {over} over all rows, "
                    "so that a copied row computes something else beside others. Declare the head fresh "
                    "(fresh=['head']), or remove it from both models."
                )
        return plan.with_source_rows(rows) if any(row.name in rows for row in weights) else plan

    def notes(self, plan: Plan) -> list[str]:
        """Return remarks on the labels that only one of the two knows, if rows of the plan are copied by label."""
        new = [label for label in self.target if label not in self.source]
        left = [label for label in self.source if label not in self.target]
        said = {"new": new, "of the source that the target does not have": left}
        found = [f"labels {which}: {_listed(labels)}" for which, labels in said.items() if labels]
        return [] if plan.source_rows is None else found


def row_mask(shape: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Return a mask of a tensor's rows, (rows, 1, ..., 1), true at these indices of the first dimension."""
    mask = torch.zeros(shape[0], *[1] * (len(shape) - 1), dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def rows_by_label(value: Tensor, numbers: Sequence[int | None]) -> Tensor:
    """Return a source tensor's rows in the order of the target's labels, 0 for those that the source does not know."""
    rows = value.new_zeros(len(numbers), *value.shape[1:])
    known = [place for place, number in enumerate(numbers) if number is not None]
    rows[known] = value[[number for number in numbers if number is not None]]
    return rows


def _by_columns(module: nn.Module | None) -> bool:
    """Return whether a module's weight has its outputs on another axis than the first."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return isinstance(module, transposed) or type(module).__name__ == "Conv1D"  # of Hugging Face's GPT-2


def _normalised_together(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return the normalisation through which the rows of a weight depend on each other; None: there is none."""
    owner, _, key = name.rpartition(".")
    if key == "weight_orig" and hasattr(modules[owner], "weight_u"):
        return "a spectral norm"
    if key == "weight_v" and not getattr(modules[owner], "weight_g", torch.empty(1)).ndim:
        return "a weight norm"
    if ".parametrizations." not in f".{name}":
        return None
    kinds = ((type(part).__name__.strip("_"), getattr(part, "dim", None)) for part in modules[owner].children())
    return next((kind for kind, dim in kinds if (kind, dim) != ("WeightNorm", 0)), None)


def _listed(labels: Sequence[Any]) -> str:
    return ", ".join(map(str, labels[:_SHOWN])) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")
