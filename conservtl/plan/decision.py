"""Decisions of a plan beside its rows: their base, and those that act before and after training or in modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from inspect import isabstract
from typing import Any, ClassVar, Literal, Self

from pydantic import ModelWrapValidatorHandler, SerializeAsAny, model_validator
from torch import Tensor, nn

from conservtl.bounds import Count
from conservtl.functions import Forward, Loss
from conservtl.layers import Layer
from conservtl.layers.extended import restore_module
from conservtl.spec_model import FrozenModel, register

__all__ = [
    "After",
    "Afters",
    "Decision",
    "Extension",
    "Extensions",
    "FinishContext",
    "Measure",
    "MeasureContext",
    "Measures",
    "Search",
    "Searches",
    "apply_extensions",
]


class Decision(FrozenModel, ABC):
    """Base class of decisions beside the rows: frozen specs that are printed and saved with the plan.

    A subclass has a constant ``kind`` with its value as the default, and methods that carry the decision out on
    tensors. The built-in ones are in the files of their methods; a strategy of your own brings its own.
    """

    kind: str
    """Name of the class in files."""
    by: str
    """The strategy that made the decision."""

    kinds: ClassVar[dict[str, type[Decision]]] = {}
    """Kind -> class, by which a plan is read back from JSON."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            register(Decision.kinds, cls, kind)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        named = Decision.kinds.get(value.get("kind", "")) if isinstance(value, dict) else None
        if named is not None and named is not cls and issubclass(named, cls):
            return named.model_validate(value)
        if named is None and isabstract(cls) and isinstance(value, dict):
            raise ValueError(f"there is no {cls.__name__} of kind {value.get('kind')!r}: import its class first")
        return handler(value)

    @property
    def name(self) -> str:
        """Name in the plan, which holds no two decisions of one kind and name."""
        return self.kind

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the plan's table."""

    def check(self, model: nn.Module) -> None:
        """Raise, before anything is changed, if the decision cannot be carried out on a model; by default never."""


class Extension(Decision):
    """Modules that compute something else than in the source, from the same parameters and buffers.

    They do so in training and afterwards. An extension calls ``layers.extended.extend_module``, so that the next
    adaptation can undo it, and is saved with the model.
    """

    @abstractmethod
    def extend(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Extend modules in place; a second call changes nothing.

        Args:
            model: unwrapped.
            layers: its layers, input side first.
        """


Extensions = tuple[SerializeAsAny[Extension], ...]


def apply_extensions(model: nn.Module, extensions: Iterable[Extension], layers: Sequence[Layer]) -> None:
    """Extend the modules that these extensions name, and restore all others."""
    for module in model.modules():
        restore_module(module)
    for extension in extensions:
        extension.extend(model, layers)


class Search(Decision):
    """A choice made before training: each candidate is trained on a copy and scored on the validation part."""

    epochs: Count | None = None
    """Length of each trial; None: a fifth of the run's, at least one."""

    @property
    def remedy(self) -> str:
        """Sentence that says what to call in a training loop without ``fit``."""
        return "Call conservtl.best_block(adaptation, train, valid) before optimizer(...)."

    @abstractmethod
    def trials(self) -> Mapping[str, Mapping[str, str]]:
        """Return each candidate's name with the facts by which the plan is drawn up to try that candidate.

        With these facts in ``plan.facts`` the strategy must decide, and no longer ask for this search.
        """

    def decide(self, scores: Mapping[str, float]) -> Mapping[str, str]:
        """Return the facts of the run; by default those of the best candidate, the first of equals.

        Args:
            scores: candidate -> its validation score, higher is better.
        """
        return self.trials()[max(scores, key=scores.__getitem__)]


Searches = tuple[SerializeAsAny[Search], ...]


@dataclass(frozen=True)
class MeasureContext:
    """Inputs of a measurement.

    Args:
        model: the model at its starting point, or the source model; in eval mode, on its device.
        batches: batches on the model's device; can be iterated repeatedly.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        modules: layer -> its module in the model.
        parameters: canonical name -> parameter of the model.
        autocast: makes the context of the run's forward passes.
        left_out: name of a parameter -> indices of its rows that the source and the model to adapt do not share.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    loss: Loss
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    autocast: Callable[[], AbstractContextManager[Any]]
    left_out: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Measure(Decision):
    """A measurement made once before training, kept by its name and saved with the run."""

    data: Literal["target", "source"] = "target"
    """target: on the adaptation data, with the model at its starting point. source: on source data, with the source
    model and its own head."""

    @property
    def remedy(self) -> str:
        """Sentence that says what to call in a training loop without ``fit``."""
        on = ", on='source'" if self.data == "source" else ""
        return f"Call adaptation.measure(batches{on}) before optimizer(...)."

    @abstractmethod
    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
        """Return the measurement, name -> tensor. Leaves the model unchanged, but for modes and generators."""

    def verify(self, found: Mapping[str, Tensor]) -> None:
        """Raise a ``SpecError`` if tensors from elsewhere cannot be this measurement; by default never."""

    def use(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        """Change the model by the measurement, right after it was made; by default not at all."""


Measures = tuple[SerializeAsAny[Measure], ...]


@dataclass(frozen=True)
class FinishContext:
    """Inputs of a decision that acts once training is over.

    Args:
        model: the trained model, with the selected weights.
        start: the starting point: name -> tensor on the CPU, for parameters and buffers from the source.
        batches: the training data's batches; None if the training loop gave none.
        forward: (model, batch) -> outputs.
        score: () -> score of the current weights on the validation part, higher is better; None without such a part.
        valid: the validation part's batches; None without such a part.
        objective: (model, batch of ``valid``) -> its loss, a scalar.
        margin: largest difference of scores that counts as chance.
    """

    model: nn.Module
    start: Mapping[str, Tensor]
    batches: Iterable[Any] | None
    forward: Forward
    score: Callable[[], float] | None
    valid: Iterable[Any] | None = None
    objective: Callable[[nn.Module, Any], Tensor] | None = None
    margin: float = 0.0


class After(Decision):
    """A change of the weights once training is over."""

    interpolates: ClassVar[bool] = False
    """Whether it moves the weights along the line from the start to those after training."""
    scored: ClassVar[bool] = False
    """Whether it needs a validation part, without which it is refused before training."""
    shards: ClassVar[bool] = True
    """Whether it supports sharded parameters, which are refused before training otherwise."""

    @abstractmethod
    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Change ``ending.model`` in place.

        Returns:
            Facts for the report. ``t`` among them is the position of the weights on the line from the start (0) to
            those after training (1).
        """


Afters = tuple[SerializeAsAny[After], ...]
