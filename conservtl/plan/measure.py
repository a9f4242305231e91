"""Measurements made once before training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import SerializeAsAny
from torch import Tensor, nn

from conservtl.functions import Forward, Loss
from conservtl.plan.decision import Decision

__all__ = ["Measure", "MeasureContext", "Measures"]


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
