"""The work after training, on the data of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["Batches", "score"]


class Batches:
    """The batches of a Trainer's data on its device, as often as they are iterated.

    Args:
        loader: () -> DataLoader.
        place: batch -> the batch on the model's device.
    """

    def __init__(self, loader: Callable[[], Iterable[Any]], place: Callable[[Any], Any]) -> None:
        self._loader, self._place = loader, place

    def __iter__(self) -> Iterator[Any]:
        return map(self._place, self._loader())


def score(trainer: Any) -> float:
    """Return the metric for the best model, as the Trainer's arguments name it, else the loss; higher is better."""
    name = trainer.args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    value = float(trainer.evaluate()[name])
    return value if trainer.args.greater_is_better else -value
