"""The task of a problem that a program holds: its functions, and its data by target, seed and number of shots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from conservtl.data import Augmentation, Data, Domains, carve, draw_shots, take
from conservtl.engine.evaluation import Functions
from conservtl.errors import SpecError, counted
from conservtl.experiments.own.data import class_numbers
from conservtl.experiments.own.maker import Maker
from conservtl.experiments.own.settings import OwnData, OwnModel
from conservtl.functions import MetricValue
from conservtl.spec_model import FrozenModel
from conservtl.tasks.base import Shift
from conservtl.tasks.classification import Classification
from conservtl.tasks.headline import Headline
from conservtl.tasks.named_target import NamedTarget

__all__ = ["OwnSets", "OwnTask"]

Augment = Callable[[Any, torch.Generator], Any]


class _AsHeld(FrozenModel):
    """Preprocessing of inputs that a program holds: there is none, and no files."""

    def read(self, files: Sequence[Path]) -> Any:
        """Raise: the inputs are in memory."""
        raise SpecError(
            f"the inputs are held in memory; received {counted(len(files), 'file')}. Give tensors to the model."
        )


@dataclass(frozen=True)
class OwnSets:
    """The data of a problem.

    Args:
        train: target -> labelled examples to adapt with.
        test: target -> examples held out of them.
        valid: target -> examples to select on; empty: a part of ``train`` if the settings ask for one.
        source_train: source examples for joint training and for measurements; None: there are none.
        source_test: source examples held out; None: there are none.
        labels: of the model's outputs.
        source_labels: of the source model's outputs.
    """

    train: Mapping[str, Data]
    test: Mapping[str, Any]
    valid: Mapping[str, Any]
    source_train: Data | None
    source_test: Any
    labels: tuple[str, ...]
    source_labels: tuple[str, ...]


class OwnTask(NamedTarget, Classification, registered=False):
    """A problem's functions and data as a task; no spec can name it.

    Args:
        functions: forward, loss and metrics.
        sets: the data.
        headline: the metric that runs are judged by.
        make: makes a model.
        augment: of the training batches; None: none.
        proxies: as for ``fit``; None: none.
        classes: whether each example has one class.
        shift: how the target differs from a source of the same labels.
        usual_lr: a rate that fits the model, for a recommendation.
    """

    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "A problem that a program holds."
    model_section: ClassVar[type[BaseModel]] = OwnModel
    data_section: ClassVar[Any] = OwnData
    preprocessing: ClassVar[type[BaseModel]] = _AsHeld

    def __init__(
        self,
        functions: Functions,
        sets: OwnSets,
        headline: Headline,
        make: Maker,
        augment: Augment | None,
        proxies: Augment | None,
        *,
        classes: bool,
        shift: Shift,
        usual_lr: float,
    ) -> None:
        self.functions, self.sets, self.make = functions, sets, make
        self.augment, self.proxies = augment, proxies
        # Other tasks have these for all their problems, as attributes of the class.
        vars(self).update(headline=headline, has_classes=classes, shift=shift, usual_lr=usual_lr)

    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Domains:  # noqa: ARG002
        """Return the sets of a target, its shots drawn and its validation part carved by ``seed``."""
        sets, target = self.sets, data.target
        shots, held = sets.train[target], sets.valid.get(target)
        numbers = None
        if data.shots != "all":
            numbers = class_numbers(shots, classes=self.has_classes)
            chosen = draw_shots(numbers, data.shots, seed, spare=0)[0]
            shots, numbers = take(shots, chosen), [numbers[place] for place in chosen]
        if held is None and data.validation:
            numbers = class_numbers(shots, classes=self.has_classes) if numbers is None else numbers
            kept, carved = carve(numbers, data.validation, seed)
            if carved:
                shots, held = take(shots, kept), take(shots, carved)
        return Domains(
            labels=sets.labels,
            source_labels=sets.source_labels,
            shots=shots,
            validation=held,
            target_test=sets.test[target],
            source_train=sets.source_train if source else None,
            source_test=sets.source_test,
            preprocessing=_AsHeld(),
            augmentation=self.augment,  # type: ignore[arg-type]
            proxies=self.proxies,  # type: ignore[arg-type]
        )

    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:  # noqa: ARG002
        """Return a new model as the program makes it."""
        return self.make()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs, by the program's function."""
        return self.functions.forward(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss, by the program's function."""
        return self.functions.loss(outputs, batch)

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, MetricValue]:
        """Return the metrics, by the program's function."""
        return self.functions.metrics(outputs, batch)

    def labels(self, batch: Any) -> Any:
        """Return the class of each example; None without classes."""
        return super().labels(batch) if self.has_classes else None

    def augmented(self, augmentation: Augmentation | None) -> Augment | None:
        """Return the program's function, which takes batches."""
        return augmentation

    def targets(self, data: Any) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the targets."""
        return tuple(self.sets.train)

    def shares_labels(self, data: Any) -> bool:  # noqa: ARG002
        """Whether one head serves both domains."""
        return self.sets.labels == self.sets.source_labels
