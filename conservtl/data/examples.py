"""Labelled examples: in memory, a dictionary of tensors, or a dataset; counted, thinned and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from conservtl.batches import as_tensor
from conservtl.data.sequences import Sequences, joined
from conservtl.errors import DataError, counted

__all__ = ["Data", "Examples", "first_batch", "join", "length_of", "spread", "take"]


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
                rows = isinstance(value, Tensor) and value.ndim
                count = counted(len(value), "row") if rows else type(value).__name__
                raise DataError(
                    f"Examples.{field} must be a tensor or an array with one row for each of "
                    f"{counted(len(self.names), 'name')}; received {count}. Give as many names as rows."
                )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> Examples:
        """Return the examples at these positions, in this order."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        return Examples(self.inputs[at], self.labels[at], tuple(self.names[i] for i in index))


Data = Examples | Sequences | Mapping[str, Tensor] | Dataset[Any]
"""Examples; sequences of different lengths; a dictionary of tensors with one row an example, where they fit into
memory; else a map-style dataset of (input, label) or of such dictionaries."""


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
    return take(data, [number * length // most for number in range(most)])


def take(data: Data, places: Sequence[int]) -> Data:
    """Return the examples at these positions, in this order."""
    if isinstance(data, (Examples, Sequences)):
        return data.take(places)
    if isinstance(data, Mapping):
        return {key: tensor[list(places)] for key, tensor in data.items()}
    return Subset(data, places)


def first_batch(data: Data, size: int) -> Any:
    """Return the first ``size`` examples as a batch: (inputs, labels), or a dictionary."""
    if isinstance(data, Examples):
        return data.inputs[:size], data.labels[:size]
    if isinstance(data, Mapping):
        return {key: tensor[:size] for key, tensor in data.items()}
    if isinstance(data, Sequences):
        return data.batch(range(min(size, len(data))))
    return default_collate([data[place] for place in range(min(size, length_of(data)))])


def join(parts: Sequence[Data]) -> Data:
    """Return the examples of all parts in one, each part as it is: Examples stay Examples."""
    examples = [part for part in parts if isinstance(part, Examples)]
    if len(examples) == len(parts):
        inputs, labels = (torch.cat([getattr(part, name) for part in examples]) for name in ("inputs", "labels"))
        return Examples(inputs, labels, tuple(name for part in examples for name in part.names))
    sequences = [part for part in parts if isinstance(part, Sequences)]
    if len(sequences) == len(parts):
        return joined(sequences)
    if sequences:
        kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise DataError(f"data: sequences of different lengths join their like alone; received {kinds}. Convert them.")
    datasets: list[Any] = [_Rows(part) if isinstance(part, (Examples, Mapping)) else part for part in parts]
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
