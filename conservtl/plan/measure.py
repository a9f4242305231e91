"""Measurements made once before training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import SerializeAsAny
from torch import Tensor, nn

from conservtl.functions import Forward, Loss
from conservtl.plan.decision import Decision

__all__ = ["Measure", "MeasureContext", "Measures"]


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


Measures = tuple[SerializeAsAny[Measure], ...]
