"""Changes to the weights once training is over."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import SerializeAsAny
from torch import Tensor, nn

from conservtl.functions import Forward
from conservtl.plan.decision import Decision

__all__ = ["After", "Afters", "FinishContext"]


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
