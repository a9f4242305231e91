"""What a strategy can decide beside the rows: a term of the loss, an update, a measurement, an ending.

Each is a frozen spec that stands in the plan, is printed and saved with it, and knows how to carry itself
out on the tensors it is handed. The built-in ones are in ``conserve``; a strategy of a user's own brings
its own class in the same file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from inspect import isabstract
from typing import Any, ClassVar, Literal, Self

from pydantic import ModelWrapValidatorHandler, SerializeAsAny, model_validator
from torch import Tensor, nn

from conservtl.bounds import Count, Share
from conservtl.functions import Forward, Loss
from conservtl.layers import Layer
from conservtl.plan.row import Row
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
    "Moving",
    "Search",
    "Searches",
    "Step",
    "Term",
    "Terms",
]
__all__ += ["Update", "Updates", "View"]


class Decision(FrozenModel, ABC):
    """Base of what stands in a plan beside its rows. A subclass has a ``kind`` with its value as the default."""

    kind: str
    """Tells it apart in a file."""
    by: str
    """The strategy that decided it."""

    kinds: ClassVar[dict[str, type[Decision]]] = {}
    """Every class by its kind, so that a plan can be read back from JSON."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            register(Decision.kinds, cls, kind)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        own = Decision.kinds.get(value.get("kind", "")) if isinstance(value, dict) else None
        if own is not None and own is not cls and issubclass(own, cls):
            return own.model_validate(value)
        if own is None and isabstract(cls) and isinstance(value, dict):
            raise ValueError(f"there is no {cls.__name__} of kind {value.get('kind')!r}: import its class first")
        return handler(value)

    @property
    def name(self) -> str:
        """What it is called in a plan, which holds no two of one name."""
        return self.kind

    @abstractmethod
    def describe(self) -> str:
        """One line for the plan's table."""

    def check(self, model: nn.Module) -> None:
        """Raise, before anything is changed, if the decision cannot be carried out on a model; by default never."""


class Extension(Decision):
    """Modules that compute otherwise than in the source, with the same parameters and buffers, in training and after.

    It acts by ``layers.extended.extend_module``, so that the next adaptation can end it, and is saved with the model.
    """

    @abstractmethod
    def extend(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Extend modules in place; a second call changes nothing.

        Args:
            model: unwrapped.
            layers: its layers, input side first.
        """


@dataclass(frozen=True)
class View:
    """What one model makes of a batch.

    Args:
        outputs: the model's outputs. Where the target has labels of its own: those of the source's head, on
            the adapted body's features or on the source's.
        features: layer -> its output, (N, ...), for the layers that a term taps.
        entering: module -> its input, (N, ...), for the modules that a term asks for; of the adapted model only.
    """

    outputs: Any
    features: Mapping[str, Tensor] = field(default_factory=dict)
    entering: Mapping[str, Tensor] = field(default_factory=dict)


class Term(Decision):
    """A part of the loss that needs outputs or activations: loss × share of the task + value."""

    taps: tuple[str, ...] = ()
    """Layers whose outputs it needs."""
    enters: tuple[str, ...] = ()
    """Modules whose inputs it needs, the head's say."""
    reads: tuple[str, ...] = ()
    """Measurements it needs, by name."""
    task: Share = 1.0
    """Factor on the task's own loss."""

    source: ClassVar[bool] = True
    """Whether it looks at the source model; a frozen copy is then kept, and run on each batch."""
    mean_over_batch: ClassVar[bool] = True
    """Whether the value is a mean over the batch, so that a batch twice over gives the same value."""
    heads: ClassVar[bool] = False
    """Whether it compares outputs, so that the source's head is kept where the target has labels of its own."""

    @abstractmethod
    def value(self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The term, a scalar with its strength in it, the mean over the batch.

        Args:
            adapted: of the model that is trained, with gradient.
            source: of the source model on the same inputs, without; None where ``source`` is False.
            measured: what it reads of what was measured before training, by the measures' names, on the device.
        """


@dataclass(frozen=True)
class Moving:
    """One trained parameter in a step.

    Args:
        row: its row of the plan.
        parameter: the tensor; if it is sharded a ``DTensor``, of which this process holds a part.
        anchor: its starting value, placed as it is; None if it is fresh, or if it is not asked for.
        group: its group of the optimizer; ``lr`` is its rate.
        measured: name of a measurement -> the tensor for this parameter, placed as it is.
    """

    row: Row
    parameter: Tensor
    anchor: Tensor | None
    group: dict[str, Any]
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Canonical name of the parameter."""
        return self.row.name


@dataclass(frozen=True)
class Step:
    """What an update sees of a step of the optimizer.

    Args:
        moving: the parameters it acts on that are trained now, in the plan's order.
        number: steps done before this one.
        skip: scalar tensor, non-zero where the step is going to be skipped (a scaler's ``found_inf``); to be read on
            the device. None where nobody can skip.
        scale: the factor that the gradients still carry, which a fused optimizer divides out. None: none.
    """

    moving: Sequence[Moving]
    number: int
    skip: Tensor | None = None
    scale: Tensor | None = None


class Update(Decision):
    """Something done to weights at each step beside the gradient.

    Its moments, all without gradient: ``prepare`` before a forward pass, ``gradients`` when they are complete and
    unscaled (or carry ``step.scale``) and before any pull, ``before`` and ``after`` the optimizer's step. What it
    must remember from one moment or step to the next stands in ``state``, which is saved with the adaptation.
    Random numbers come from a generator of its own, seeded by ``step.number``, so that copies, resumed runs and other
    processes draw the same. Where ``step.skip`` is not zero ``after`` changes nothing: the step is none.
    Nothing here may wait for the device: no ``item()``, no comparison on the host.
    """

    names: tuple[str, ...]
    """Parameters it acts on, while they are trained."""

    precedence: ClassVar[int] = 0
    """Updates of a lower precedence act first, and last after the step, as contexts nest; equal ones act by name. The
    built-in ones: AutoRGN -20 (the others see the rate it sets), Mixout -10 (the others see plain weights), proximal
    steps 10, Projection 20, SelectiveDecay 30 (it sees the weights as the optimizer left them)."""
    forward: ClassVar[bool] = False
    """Whether ``prepare`` is wanted, before each forward pass of the model."""
    layered: ClassVar[bool] = False
    """Whether each layer needs groups of its own in the optimizer, so that the update can set its rate."""
    anchors: ClassVar[bool] = True
    """Whether it needs to know where its parameters started; else ``Moving.anchor`` is None, and costs no memory."""
    shards: ClassVar[bool] = False
    """Whether it acts rightly on parameters that are sharded by rows over processes (FSDP2); else they are refused."""

    def prepare(self, step: Step, state: dict[str, Tensor], training: bool) -> None:
        """Before a forward pass; ``training``: in train mode and with gradients."""

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Once a step, before the pull."""

    def before(self, step: Step, state: dict[str, Tensor]) -> None:
        """Right before the optimizer's step and a decoupled pull."""

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Right after it; updates act in the reverse of their order here, as contexts nest."""


@dataclass(frozen=True)
class MeasureContext:
    """What a measurement has to go by.

    Args:
        model: the model at its starting point, or the source model; in eval mode, on its device.
        batches: batches on the model's device, to be gone through as often as needed.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        modules: layer -> its module in the model.
        parameters: canonical name -> parameter of the model.
        autocast: makes the context that the run's forward passes are under.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    loss: Loss
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    autocast: Callable[[], AbstractContextManager[Any]]


class Measure(Decision):
    """Something measured once before training, kept by its name and saved with the run."""

    data: Literal["target", "source"] = "target"
    """target: on the adaptation data, with the model at its starting point. source: on source data, with the source
    model and its own head."""

    @property
    def remedy(self) -> str:
        """What to call in a loop of one's own, as a sentence."""
        on = ", on='source'" if self.data == "source" else ""
        return f"Call adaptation.measure(batches{on}) before optimizer(...)."

    @abstractmethod
    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
        """The measurement: name -> tensor. Changes nothing; modes and generators are put back for it."""

    def verify(self, found: Mapping[str, Tensor]) -> None:
        """Refuse with a ``SpecError`` what cannot be this measurement, where it was made before; by default nothing."""

    def use(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        """Act on the model by it, right after it was measured; by default nothing."""


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


@dataclass(frozen=True)
class FinishContext:
    """What there is when training is over.

    Args:
        model: as trained; weights that were selected are loaded.
        start: the starting point: name -> tensor on the CPU, for parameters and buffers that came from the source.
        batches: the training data's batches, or None in a loop of one's own that gave none.
        forward: (model, batch) -> outputs.
        score: () -> score of the model as it is now on the validation part, higher is better; None without one.
        valid: the validation part's batches, None without one.
        objective: (model, batch of ``valid``) -> its loss, a scalar.
        margin: differences of the score up to this are chance.
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
    """Something done to the weights once training is over."""

    interpolates: ClassVar[bool] = False
    """Whether it moves the weights on the line from the start to those after training."""

    scored: ClassVar[bool] = False
    """Whether it needs a validation part; refused before training where there is none."""
    shards: ClassVar[bool] = True
    """Whether it can be done with sharded parameters; else they are refused before training."""

    @abstractmethod
    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Change ``ending.model`` in place.

        Returns:
            Facts for the report. ``t`` among them, where there is one, says that the weights now lie on the line from
            the start (0) to those after training (1), and where.
        """


Extensions = tuple[SerializeAsAny[Extension], ...]
Terms = tuple[SerializeAsAny[Term], ...]
Updates = tuple[SerializeAsAny[Update], ...]
Measures = tuple[SerializeAsAny[Measure], ...]
Searches = tuple[SerializeAsAny[Search], ...]
Afters = tuple[SerializeAsAny[After], ...]
