"""Labels of data by other numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from conservtl.data.examples import Data, Examples
from conservtl.data.sequences import Sequences
from conservtl.errors import DataError

__all__ = ["renumber"]


def renumber(data: Data, numbers: Sequence[int]) -> Data:
    """Return the data with class ``numbers[k]`` wherever it has class ``k``; numbers below 0 are no classes and stay.

    Args:
        data: its classes are whole numbers: labels of Examples, the entry ``labels`` of a dictionary, or the second of
            each pair of a dataset.
        numbers: the new number of each class.

    Raises:
        DataError: the labels are no classes.
    """
    if isinstance(data, Examples):
        return replace(data, labels=_renumbered(data.labels, numbers))
    if isinstance(data, Sequences):
        return replace(data, labels=tuple(_renumbered(one, numbers) for one in data.labels))
    if isinstance(data, Mapping):
        return {**data, "labels": _renumbered(data.get("labels"), numbers)}
    return _Renumbered(data, tuple(numbers))


def _renumbered(labels: Any, numbers: Sequence[int]) -> Any:
    """Return labels of the same kind, a tensor or a number, by their new numbers."""
    if not isinstance(labels, (int, np.ndarray, np.integer, Tensor)):
        raise DataError(
            f"source.labels: the source's labels must be whole numbers to be put into another order; received "
            f"{type(labels).__name__}. Give source.labels in the order of the data."
        )
    old = torch.as_tensor(labels)
    if old.is_floating_point() or old.is_complex():
        raise DataError(
            f"source.labels: the source's labels must be whole numbers to be put into another order; received "
            f"{old.dtype}. Give source.labels in the order of the data."
        )
    new = torch.where(old < 0, old, torch.tensor(numbers)[old.clamp_min(0).long()].to(old.dtype))
    return new if isinstance(labels, Tensor) else new.numpy() if isinstance(labels, np.ndarray) else int(new)


class _Renumbered(Dataset[Any]):
    """A dataset with other numbers of its classes; examples are read on access."""

    def __init__(self, data: Any, numbers: tuple[int, ...]) -> None:
        self._data, self._numbers = data, numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._data, name)
        if name in ("labels", "targets"):
            return _renumbered(torch.as_tensor(value), self._numbers)
        return value

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> Any:
        example = self._data[place]
        if isinstance(example, Mapping):
            return {**example, "labels": _renumbered(example.get("labels"), self._numbers)}
        inputs, label, *rest = example
        return (inputs, _renumbered(label, self._numbers), *rest)
