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


Afters = tuple[SerializeAsAny[After], ...]
