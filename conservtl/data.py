"""The data that a task loads: labelled examples of two domains, and how inputs are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from conservtl.batches import as_tensor
from conservtl.errors import DataError
from conservtl.shots import Shots, number_of_shots

__all__ = [
    "Augmentation",
    "Data",
    "Domains",
    "Examples",
    "Preprocessing",
    "carve",
    "draw_shots",
    "first_batch",
    "join",
    "length_of",
    "renumber",
    "spread",
]


@dataclass(frozen=True)
class Examples:
    """Labelled examples held in memory.

    Args:
        inputs: (N, ...) float32, as the model takes them; a NumPy array or nested lists become a tensor.
        labels: (N,) int64, positions in the domain's label list. For a task without classes (N, ...) of another type,
            shaped as the model's outputs: (N, 1) float32 for the regression of one quantity, since a loss of (N, 1)
            outputs and (N,) labels would be taken over all N × N pairs.
        names: N names that a person can find the examples by (a file, a voice and a word).
    """

    inputs: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in ("inputs", "labels"):
            object.__setattr__(self, field, as_tensor(getattr(self, field)))
        object.__setattr__(self, "names", tuple(self.names))
        for field in ("inputs", "labels"):
            value: Any = getattr(self, field)
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(self.names):
                count = f"{len(value)} rows" if isinstance(value, Tensor) and value.ndim else type(value).__name__
                raise DataError(
                    f"Examples.{field} must be a tensor or an array with one row for each of {len(self.names)} names; "
                    f"received {count}. Give as many names as rows."
                )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> Examples:
        """Return the examples at these positions, in this order."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        return Examples(self.inputs[at], self.labels[at], tuple(self.names[i] for i in index))


Data = Examples | Mapping[str, Tensor] | Dataset[Any]
"""Examples, or a dictionary of tensors with one row an example (padded sequences and their lengths, say), where they
fit into memory; else a map-style dataset of (input, label) or of such dictionaries."""


class Preprocessing(Protocol):
    """Makes model inputs of files. A frozen Pydantic model, saved with the adapted model."""

    def read(self, files: Sequence[Path]) -> Any:
        """Return the inputs for these files: (N, ...) float32, or a dictionary of the model's arguments."""
        ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]:
        """Return the fields as JSON."""
        ...


class Augmentation(Protocol):
    """Changes a batch of inputs at random; draws from ``generator`` alone. A frozen Pydantic model."""

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed inputs of the same shape, on the same device."""
        ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]:
        """Return the fields as JSON."""
        ...


@dataclass(frozen=True)
class Domains:
    """The two domains of a run.

    Args:
        labels: names of the model's outputs in their order: the target's classes, tokens or quantities.
        source_labels: the same of the source model's outputs.
        shots: the target's labelled examples to adapt with.
        validation: examples held out of the shots to select on, or None.
        target_test: the rest of the target; nothing is ever selected on it.
        source_train: examples to train a source model on, or None.
        source_test: source examples held out of training, to measure what is kept. Labelled by ``source_labels``. Or
            None.
        preprocessing: makes inputs of files.
        augmentation: for adapting from a few examples, or None.
        source_augmentation: for training a source model, or None.
        notes: remarks on the data for the plan: what was left out.
        skipped: names of the files that were left out because they cannot be used -> why.
    """

    labels: tuple[str, ...]
    source_labels: tuple[str, ...]
    shots: Data
    validation: Data | None
    target_test: Data
    source_train: Data | None
    source_test: Data | None
    preprocessing: Preprocessing
    augmentation: Augmentation | None = None
    source_augmentation: Augmentation | None = None
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)


def draw_shots(labels: Sequence[int], shots: Shots, seed: int) -> tuple[list[int], list[int]]:
    """Draw ``shots`` examples a label by ``seed``; return their positions and those of all others, both in order.

    A number is drawn of each label. ``all`` and ``UpTo`` leave one example of each label that has two.

    Raises:
        DataError: a label has fewer than ``shots`` examples, or none is left to test with.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == label]
        if isinstance(shots, int) and len(places) <= shots:
            raise DataError(
                f"data.shots: label {label} has {len(places)} examples; {shots} to adapt with leave none to "
                f"test on. Ask for at most {len(places) - 1}, or {{up_to: {shots}}}."
            )
        count = number_of_shots(shots, len(places), spare=1)
        chosen |= {places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()}
    rest = [i for i in range(len(labels)) if i not in chosen]
    if not rest:
        raise DataError("data.shots: every label has one example, so none is left to test on. Add examples.")
    return sorted(chosen), rest


def carve(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the shots into positions to train on and to validate on, label by label.

    At least one example a label stays in each part; with one example a label, or ``fraction`` 0,
    there is no validation part (the second list is empty).
    """
    generator = torch.Generator().manual_seed(seed + 1)
    held: set[int] = set()
    for label in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == label]
        count = min(len(places) - 1, max(1, round(fraction * len(places)))) if fraction > 0 else 0
        held |= {places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()}
    return [i for i in range(len(labels)) if i not in held], sorted(held)


def length_of(data: Data) -> int:
    """Return the number of examples."""
    if isinstance(data, Mapping):
        return len(next(iter(data.values()), ()))
    return len(data)  # type: ignore[arg-type]


def spread(data: Data, most: int | None) -> Data:
    """Return at most ``most`` examples, evenly spread over the data; None: all of them."""
    length = length_of(data)
    if most is None or length <= most:
        return data
    places = [number * length // most for number in range(most)]
    if isinstance(data, Examples):
        return data.take(places)
    if isinstance(data, Mapping):
        return {key: tensor[places] for key, tensor in data.items()}
    return Subset(data, places)


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


def first_batch(data: Data, size: int) -> Any:
    """Return the first ``size`` examples as a batch: (inputs, labels), or a dictionary."""
    if isinstance(data, Examples):
        return data.inputs[:size], data.labels[:size]
    if isinstance(data, Mapping):
        return {key: tensor[:size] for key, tensor in data.items()}
    return default_collate([data[place] for place in range(min(size, length_of(data)))])


def join(parts: Sequence[Data]) -> Data:
    """Return the examples of all parts in one, each part as it is: Examples stay Examples."""
    examples = [part for part in parts if isinstance(part, Examples)]
    if len(examples) == len(parts):
        inputs, labels = (torch.cat([getattr(part, name) for part in examples]) for name in ("inputs", "labels"))
        return Examples(inputs, labels, tuple(name for part in examples for name in part.names))
    datasets = [_Rows(part) if isinstance(part, (Examples, Mapping)) else part for part in parts]
    return ConcatDataset(datasets)


class _Rows(Dataset[Any]):
    """Examples held in memory as a dataset of rows."""

    def __init__(self, data: Examples | Mapping[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return length_of(self.data)

    def __getitem__(self, place: int) -> Any:
        if isinstance(self.data, Examples):
            return self.data.inputs[place], self.data.labels[place]
        return {key: tensor[place] for key, tensor in self.data.items()}
