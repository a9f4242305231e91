"""What every task hands to the rest: labelled examples of two domains, and how inputs are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from conservtl.errors import DataError

__all__ = ["Augmentation", "Data", "Domains", "Examples", "Preprocessing", "carve", "draw_shots", "spread"]


@dataclass(frozen=True)
class Examples:
    """Labelled examples held in memory.

    Args:
        inputs: (N, ...) float32, as the model takes them.
        labels: (N,) int64, positions in the domain's label list.
        names: N names a person can find the example by (a file, a voice and a word).
    """

    inputs: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> Examples:
        """The examples at these positions, in this order."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        return Examples(self.inputs[at], self.labels[at], tuple(self.names[i] for i in index))


Data = Examples | Dataset[tuple[Tensor, Tensor]]
"""Examples where they fit into memory, else a map-style dataset of (input, label)."""


class Preprocessing(Protocol):
    """From files to model inputs. A frozen Pydantic model, saved with the adapted model."""

    def read(self, files: Sequence[Path]) -> Tensor:
        """Inputs for these files, (N, ...) float32."""
        ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]:
        """As JSON can hold it."""
        ...


class Augmentation(Protocol):
    """Random changes of a batch of inputs; draws from ``generator`` alone."""

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Changed inputs of the same shape, on the same device."""
        ...


@dataclass(frozen=True)
class Domains:
    """The two domains of a run.

    Args:
        labels: the target's labels, in the order of the model's outputs.
        source_labels: the source's labels, in the order of the source model's outputs.
        shots: the target's labelled examples to adapt with.
        validation: carved from the shots, or None.
        target_test: the rest of the target; nothing is ever selected on it.
        source_train: what a source model can be trained on, or None.
        source_test: held out of it; measures what is kept. Labelled by ``source_labels``. Or None.
        preprocessing: how files become inputs.
        augmentation: for adapting from a few examples, or None.
        source_augmentation: for training a source model, or None.
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


def draw_shots(labels: Sequence[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions of ``shots`` examples a label, drawn by ``seed``, and of all the others, both in order.

    Raises:
        DataError: a label has fewer than ``shots`` examples, or none is left to test with.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label in sorted(set(labels)):
        own = [i for i, other in enumerate(labels) if other == label]
        if len(own) <= shots:
            raise DataError(
                f"data.shots: label {label} has {len(own)} examples; {shots} to adapt with leave none to "
                f"test on. Ask for at most {len(own) - 1}."
            )
        chosen |= {own[i] for i in torch.randperm(len(own), generator=generator)[:shots].tolist()}
    return sorted(chosen), [i for i in range(len(labels)) if i not in chosen]


def carve(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the shots into positions to train on and to validate on, label by label.

    At least one example a label stays in each part; with one example a label, or ``fraction`` 0,
    there is no validation part (the second list is empty).
    """
    generator = torch.Generator().manual_seed(seed + 1)
    held: set[int] = set()
    for label in sorted(set(labels)):
        own = [i for i, other in enumerate(labels) if other == label]
        count = min(len(own) - 1, max(1, round(fraction * len(own)))) if fraction > 0 else 0
        held |= {own[i] for i in torch.randperm(len(own), generator=generator)[:count].tolist()}
    return [i for i in range(len(labels)) if i not in held], sorted(held)


def spread(data: Data, most: int | None) -> Data:
    """At most so many examples, evenly spread over the data; None: all of them."""
    length = len(data)  # type: ignore[arg-type]
    if most is None or length <= most:
        return data
    index = [number * length // most for number in range(most)]
    return data.take(index) if isinstance(data, Examples) else Subset(data, index)
