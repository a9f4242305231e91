"""The task protocol: how the data of two domains is loaded, which model learns it, and how that is judged."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from conservtl.data import Augmentation, Data, Domains, Preprocessing, renumber
from conservtl.errors import counted
from conservtl.functions import MetricValue, forward, inputs_of, logits_of
from conservtl.spec_model import FrozenModel, register
from conservtl.tasks._declaration import check_declaration
from conservtl.tasks._report_hooks import ReportHooks
from conservtl.tasks._source_hooks import SourceHooks
from conservtl.tasks.headline import Headline
from conservtl.tasks.prediction import Prediction

__all__ = ["DataSection", "Prediction", "Shift", "Task", "task_classes"]

Shift = Literal["labels", "speaker", "input"]
"""How the target differs from the source: other labels; the same labels from another speaker; the same labels for
inputs that look or sound different."""

_CLASSES: dict[str, type[Task]] = {}


class DataSection(FrozenModel):
    """Base of a task's ``data`` section: the fields that every study can vary."""

    shots: Annotated[int, Field(ge=1)] = 5
    """Labelled target examples to adapt with; of each class where the task has classes."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the shots to validate on instead of training."""


class Task(ReportHooks, SourceHooks, ABC):
    """A kind of problem: sections of a spec, data, model, loss, metrics and answers.

    A subclass with a ``name`` is known to specs as ``task: NAME`` as soon as its module is imported: by
    ``--import``, or as an entry point of group ``conservtl.tasks``. It has no state but what ``within`` gives it.

    A batch is what the task's data yields: (inputs, labels), or a dictionary of tensors. Everything else in
    conservtl treats batches and outputs as opaque, so inputs of any length, sequences as outputs and a loss of its
    own need no more than these methods. Refused when the class is defined: a ``name`` without ``summary``,
    ``model_section``, ``data_section`` and ``preprocessing``, and sections that a spec cannot hold.
    """

    name: ClassVar[str]
    """Its name in a spec."""
    summary: ClassVar[str]
    """One line for the JSON schema."""
    model_section: ClassVar[type[BaseModel]]
    """The spec's ``model`` section; every field has a default."""
    data_section: ClassVar[Any]
    """The spec's ``data`` section: a subclass of ``DataSection``, or a union of them told apart by ``kind``."""
    preprocessing: ClassVar[type[BaseModel]]
    """The class of ``Domains.preprocessing``, to read back what was saved with a model."""
    headline: ClassVar[Headline] = Headline()
    """The metric that runs are selected and compared by."""
    example: ClassVar[str] = "example"
    """A person's word for one example: recording, image."""
    pipeline: ClassVar[str | None] = None
    """The Hugging Face Hub's name of the task, for a model's card."""
    has_classes: ClassVar[bool] = False
    """Whether ``labels`` gives the class of each example: shots are counted a class, and ``recommend`` measures
    features."""
    labels_are_outputs: ClassVar[bool] = False
    """Whether each of ``Domains.labels`` names one output of the head, such as a class or a token: rows of labels that
    the source has too are copied. Tasks with classes need not say so."""
    shift: ClassVar[Shift] = "input"
    """How the target differs where source and target share their labels."""
    takes: ClassVar[str] = ""
    """The call that a model must answer, for messages: take ... and return .... Empty: not said."""
    usual_lr: ClassVar[float] = 3e-4
    """A learning rate that fits the task's networks, for ``recommend``."""

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__ or not registered:
            return
        check_declaration(cls)
        register(_CLASSES, cls, cls.name)

    @abstractmethod
    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Domains:
        """Read the two domains that a spec names.

        Args:
            data: the spec's ``data`` section.
            model: its ``model`` section, where the inputs depend on the network.
            seed: draws the shots and the validation part.
            source: False leaves the source's data unread; ``source_train`` and ``source_test`` are None.

        Raises:
            DataError: data is missing, unreadable, or contradicts the spec.
        """

    @abstractmethod
    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:
        """Return the named network with fresh weights.

        Args:
            model: the spec's ``model`` section.
            preprocessing: how files become its inputs.
            outputs: the number of its outputs, as many as ``Domains.labels``.

        Raises:
            SpecError: there is no such network, or its arguments do not fit.
        """

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's outputs for a batch."""
        return forward(model, batch)

    def answer(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs that are scored and shown; the default is ``forward``.

        A model that needs more work for its answer than for its loss, such as one that generates a text, does it here.
        """
        return self.forward(model, batch)

    def reads_labels(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Return whether the model reads a batch's labels, as a decoder does: they must then be its own, by number."""
        return False

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss, a scalar, the mean over the batch."""

    @abstractmethod
    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, MetricValue]:
        """Return each metric: its mean over the batch, or a pair (sum, count) that is pooled over a set."""

    @abstractmethod
    def predictions(self, outputs: Any, labels: tuple[str, ...], files: Sequence[Path]) -> list[Prediction]:
        """Return the answer for each file from the outputs for all of them.

        Args:
            outputs: of the model, one row a file.
            labels: names of the model's outputs.
            files: what was read.
        """

    def joined(
        self, outputs: Sequence[Any], spans: Sequence[tuple[float, float]], labels: tuple[str, ...], file: Path
    ) -> Prediction:
        """Return the answer for one file from the outputs for its windows, if the preprocessing reads windows.

        Args:
            outputs: of each window.
            spans: (start, end) of each.
            labels: names of the model's outputs.
            file: what was read.
        """
        raise NotImplementedError(f"{type(self).__name__} reads files in windows, so it needs joined().")

    @property
    def by_label(self) -> bool:
        """Whether a head's rows are copied by label."""
        return self.has_classes or self.labels_are_outputs

    def fault(self, outputs: Any, labels: int) -> str | None:
        """Return what is wrong with a model's outputs, as "must ...; it ...", or None.

        The default takes (N, classes, ...) where the task has classes.

        Args:
            outputs: of the model on a few examples.
            labels: how many labels there are.
        """
        logits = logits_of(outputs) if self.has_classes else None
        if logits is None or logits.ndim <= 1 or logits.shape[1] == labels:
            return None
        return (
            f"must have an output for each of {counted(labels, 'label')}; it has {logits.shape[1]}. Leave the "
            "number of outputs "
            "out of the section model, or correct the data's labels."
        )

    def outputs_at(self, outputs: Any, places: Sequence[int]) -> Any:
        """Return the outputs of some labels, in this order; the default takes (N, classes, ...).

        Args:
            outputs: of the model.
            places: positions in its list of labels.
        """
        logits = logits_of(outputs)
        return logits.index_select(1, torch.tensor(list(places), device=logits.device))

    def within(self, labels: tuple[str, ...], preprocessing: Any) -> Task:  # noqa: ARG002
        """Return the task as its metrics and answers need it, with the names of outputs and what made the inputs.

        Args:
            labels: names of the model's outputs.
            preprocessing: of the domains, or saved with a model.
        """
        return self

    def inputs(self, batch: Any) -> Any:
        """Return what the model is called with: the first of a tuple, or a dictionary without its labels."""
        return inputs_of(batch)

    def labels(self, batch: Any) -> Tensor | None:  # noqa: ARG002
        """Return the class of each example, (N,), or None where the task has no classes."""
        return None

    def targets(self, data: Any) -> tuple[str, ...]:  # noqa: ARG002
        """Return every target that a study can repeat its runs over: speakers, corruptions, ..."""
        return ("the target",)

    def on_target(self, data: Any, target: str) -> dict[str, Any]:  # noqa: ARG002
        """Return the fields of a spec, by dotted name, that make another of ``targets`` the target."""
        return {}

    def target_name(self, data: Any, domains: Domains) -> str:  # noqa: ARG002
        """Return what a report calls the target."""
        return "the target"

    def shares_labels(self, data: Any) -> bool:  # noqa: ARG002
        """Whether every label of the source's data is one of the target's, so that both can be trained on together."""
        return True

    def renumbered(self, data: Data, numbers: Sequence[int]) -> Data:
        """Return the source's data with label ``numbers[k]`` wherever it has label ``k``.

        Called where a spec lists the source model's labels in another order than ``load``.
        """
        return renumber(data, numbers)

    def augmented(self, augmentation: Augmentation | None) -> Callable[[Any, torch.Generator], Any] | None:
        """Return a function that augments a batch with draws from a generator, as ``fit`` takes it.

        Args:
            augmentation: of inputs, from ``Domains``; None: no augmentation.
        """
        if augmentation is None:
            return None

        def augment(batch: Any, generator: torch.Generator) -> Any:
            inputs, *rest = batch
            return (augmentation(inputs, generator), *rest)

        return augment

    def fingerprint(self, data: Any, train: Data, preprocessing: Preprocessing) -> Any:
        """Return what identifies the source's training data without decoding it, as JSON: for the model's cache.

        Args:
            data: the spec's ``data`` section.
            train: the source's training data.
            preprocessing: how files become inputs.

        The default takes the whole section but ``shots`` and ``validation``, which belong to the target. A task whose
        files can change under the same names adds their sizes and times (``conservtl.tasks.fingerprint``).
        """
        section = data.model_dump(mode="json", exclude={"shots", "validation"})
        return [section, preprocessing.model_dump(mode="json"), len(train)]  # type: ignore[arg-type]


def task_classes(*, unfinished: bool = False) -> dict[str, type[Task]]:
    """Return the tasks defined so far, by name, those of user modules included.

    Args:
        unfinished: whether to return those that lack methods instead of the others.
    """
    return {name: cls for name, cls in _CLASSES.items() if inspect.isabstract(cls) is unfinished}
