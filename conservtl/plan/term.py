"""Terms of the loss that need outputs or activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import SerializeAsAny
from torch import Tensor

from conservtl.bounds import Share
from conservtl.plan.decision import Decision

__all__ = ["Term", "Terms", "View"]


@dataclass(frozen=True)
class View:
    """Outputs and activations of one model on a batch.

    Args:
        outputs: the model's outputs. If the target has labels of its own: those of the source's head, on the adapted
            body's features or on the source's.
        features: layer -> its output, (N, ...), for the layers in ``Term.taps``.
        entering: module -> its input, (N, ...), for the modules in ``Term.enters``; of the adapted model only.
    """

    outputs: Any
    features: Mapping[str, Tensor] = field(default_factory=dict)
    entering: Mapping[str, Tensor] = field(default_factory=dict)


class Term(Decision):
    """A part of the loss that needs outputs or activations. The loss is then task × (the task's loss) + value."""

    taps: tuple[str, ...] = ()
    """Layers whose outputs it needs."""
    enters: tuple[str, ...] = ()
    """Modules whose inputs it needs: the head, for example."""
    reads: tuple[str, ...] = ()
    """Measurements it needs, by name."""
    task: Share = 1.0
    """Factor on the task's own loss."""

    source: ClassVar[bool] = True
    """Whether it needs the source model, of which a frozen copy is then kept and run on each batch."""
    mean_over_batch: ClassVar[bool] = True
    """Whether the value is a mean over the batch, so that a batch twice over gives the same value."""
    heads: ClassVar[bool] = False
    """Whether it compares outputs, so that the source's head is kept if the target has labels of its own."""

    @abstractmethod
    def value(self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the term, a scalar with its strength in it, the mean over the batch.

        Args:
            adapted: of the trained model, with gradient.
            source: of the source model on the same inputs, without gradient; None if ``source`` is False.
            measured: name of each measurement in ``reads`` -> its tensors, on the device.
        """


Terms = tuple[SerializeAsAny[Term], ...]
