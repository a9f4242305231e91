"""The two domains of a run, and how inputs are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from conservtl.data.examples import Data, length_of

__all__ = ["Augmentation", "Domains", "Preprocessing"]


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
        proxies: makes inputs unlike the shots, on which strategies compare the model with the source, or None.
        notes: remarks on the data for the plan: what was left out.
        skipped: names of the files that were left out because they cannot be used -> why.
        counts: numbers of examples where the parts' lengths do not tell them, for the report: ``shots``, those with
            labels; ``unlabelled``, those without; ``accepted`` and ``rejected``, labels that the source model gave
            them.
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
    proxies: Augmentation | None = None
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each part that there is, and those of ``counts``."""
        names = ("shots", "validation", "target_test", "source_train", "source_test")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        return {name: length_of(part) for name, part in parts.items()} | dict(self.counts)
