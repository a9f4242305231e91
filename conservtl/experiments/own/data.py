"""Data as a program holds it, in the forms that studies can count, thin and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from conservtl.batches import as_tensor, map_tensors, row_count, tensors_of
from conservtl.data import Data, Examples, length_of
from conservtl.errors import DataError
from conservtl.experiments.own.options import ProblemOptions
from conservtl.experiments.run.source_labels import classes_of

__all__ = ["SET_NAMES", "Rows", "as_data", "as_held_out", "class_numbers", "sets_of", "targets_in"]

SET_NAMES = {
    "shots": "train",
    "validation": "valid",
    "target_test": "held_out['target']",
    "source_train": "source_data",
    "source_test": "held_out['source']",
}
"""Name of each set of ``Domains`` in the calls of studies."""


def as_data(value: Any, name: str) -> Data:
    """Return data as examples, a dictionary of tensors or a dataset.

    Data is ``Examples``, a tuple (inputs, labels) or a dictionary of tensors or arrays, or a map-style dataset. A
    message has the argument's name.

    Raises:
        DataError: it is something else, such as a DataLoader, or rows of its tensors differ in number.
    """
    if isinstance(value, Examples):
        return value
    if isinstance(value, Mapping):
        tensors = {key: as_tensor(each) for key, each in value.items()}
        if tensors and all(isinstance(each, Tensor) and each.ndim for each in tensors.values()):
            _check_rows({key: len(each) for key, each in tensors.items()}, name)
            return tensors
    elif isinstance(value, (tuple, list)):
        parts = tuple(as_tensor(each) for each in value)
        if parts and all(isinstance(each, Tensor) and each.ndim for each in parts):
            _check_rows({str(place): len(each) for place, each in enumerate(parts)}, name)
            return Examples(*parts, tuple(map(str, range(len(parts[0]))))) if len(parts) == 2 else Rows(parts)
        if isinstance(value, tuple) and tensors_of(parts):
            return Rows(parts)
    elif isinstance(value, DataLoader):
        raise DataError(
            f"{name}: a study draws, splits and counts examples, which a DataLoader does not allow; received one. Pass "
            "its dataset, and its batch size in training.batch_size."
        )
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (Tensor, str)):
        return value  # type: ignore[no-any-return]
    raise DataError(
        f"{name} must be a tuple (inputs, labels), a dictionary of tensors, Examples or a map-style dataset; received "
        f"{type(value).__name__}."
    )


def as_held_out(value: Any, name: str) -> Any:
    """Return data to evaluate on: as ``as_data``, or a DataLoader as it is.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, DataLoader) and not isinstance(value.dataset, IterableDataset):
        return value
    return as_data(value, name)


def targets_in(value: Any) -> dict[str, Any]:
    """Return name -> data of each target; data that is no mapping of names is that of one target."""
    nested = isinstance(value, Mapping) and bool(value)
    if nested and not any(isinstance(as_tensor(each), Tensor) for each in value.values()):
        return {str(name): each for name, each in value.items()}
    return {"the target": value}


def class_numbers(data: Data, *, classes: bool) -> list[int]:
    """Return the class of each example; without classes all examples are of one.

    A dataset without ``labels`` or ``targets`` is read once, example by example.
    """
    if not classes:
        return [0] * length_of(data)
    found = classes_of(data)
    if found is None:
        targets = as_tensor(getattr(data, "targets", None))
        found = targets if isinstance(targets, Tensor) and targets.shape == (length_of(data),) else None
    if found is None:
        rows = (data[place] for place in range(length_of(data)))  # type: ignore[index]
        found = torch.tensor([int(row["labels"] if isinstance(row, Mapping) else row[1]) for row in rows])
    return [int(each) for each in found]


def sets_of(
    train: Any, held_out: Mapping[str, Any] | None, options: ProblemOptions
) -> tuple[dict[str, Data], dict[str, Any]]:
    """Return the training data of each target, and all other sets, in the forms that studies take."""
    sets = {name: as_data(data, "train") for name, data in targets_in(train).items()}
    held_out = {} if held_out is None else held_out
    if not isinstance(held_out, Mapping) or not held_out.keys() <= {"target", "source"}:
        received = sorted(held_out) if isinstance(held_out, Mapping) else type(held_out).__name__
        raise DataError(f"held_out must be {{'target': data, 'source': data}}; received {received}. Name these sets.")
    valid = options.get("valid")
    if isinstance(valid, bool) or (isinstance(valid, (int, float)) and not 0 <= valid < 1):
        raise DataError(f"valid must be examples, or a part of train in [0, 1); received {valid!r}.")
    given = None if isinstance(valid, (int, float)) else valid
    named: dict[str, Any] = {}
    for name, value in (("target", held_out.get("target")), ("valid", given)):
        found = {} if value is None else targets_in(value)
        named[name] = {target: as_held_out(data, name) for target, data in found.items()}
        if found and named[name].keys() != sets.keys():
            raise DataError(
                f"{'held_out' if name == 'target' else 'valid'} must have a set for each target of train "
                f"({', '.join(sets)}); received {', '.join(found)}. Name the same targets."
            )
    if not named["target"]:
        named["target"] = sets  # nothing is scored
    source, data = held_out.get("source"), options.get("source_data")
    named["source"] = None if source is None else as_held_out(source, "held_out['source']")
    named["source_train"] = None if data is None else as_data(data, "source_data")
    for name, each in {f"train {target}": data for target, data in sets.items()}.items():
        if length_of(each) == 0:
            raise DataError(f"{name}: there must be examples to adapt with; received none. Give at least one.")
    return sets, named


def _check_rows(rows: Mapping[str, int], name: str) -> None:
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{key}: {count}" for key, count in rows.items())
        raise DataError(f"{name}: every tensor must have a row for each example; received {found} rows.")


class Rows(Dataset[Any]):
    """Nested tensors as a dataset of rows."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self.length = row_count(self.parts)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Any:
        return map_tensors(self.parts, lambda tensor: tensor[place])
