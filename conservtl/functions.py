"""Default forward, loss and metrics: classification of (inputs, labels), or of a dictionary with ``labels``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import SpecError

__all__ = [
    "Forward",
    "Loss",
    "MetricPool",
    "Metrics",
    "accuracy",
    "cross_entropy",
    "forward",
    "labels_of",
    "logits_of",
]

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]
MetricValue = Tensor | float | tuple[Tensor | float, Tensor | float]
Metrics = Callable[[Any, Any], Mapping[str, MetricValue]]


class MetricPool:
    """Metrics pooled over the batches of a set.

    A metric of a batch is a mean over its examples, which is weighted by the batch's size, or a pair (sum, count), such
    as wrong words and all words. The metric of the set is the quotient of both totals.

    Example:
        >>> pool = MetricPool()
        >>> pool.add({"accuracy": 1.0, "wer": (1, 2)}, size=3)
        >>> pool.add({"accuracy": 0.0, "wer": (0, 6)}, size=1)
        >>> pool.result()
        {'accuracy': 0.75, 'wer': 0.125}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}

    def add(self, metrics: Mapping[str, MetricValue], size: int) -> None:
        """Add the metrics of a batch of ``size`` examples."""
        for name, value in metrics.items():
            total, count = value if isinstance(value, tuple) else (value * size, size)
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def result(self) -> dict[str, float]:
        """Return the metrics of all batches together; NaN for a count of 0."""
        counts = {name: float(count) for name, count in self._counts.items()}
        return {name: float(total) / counts[name] if counts[name] else math.nan for name, total in self._sums.items()}


def forward(model: nn.Module, batch: Any) -> Any:
    """Return the model's outputs for (inputs, labels), or for a dictionary of its arguments and ``labels``."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0])


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of logits (N, classes) and labels (N,)."""
    return F.cross_entropy(logits_of(outputs), labels_of(batch))


def accuracy(outputs: Any, batch: Any) -> dict[str, Tensor]:
    """Return the accuracy: the share of examples whose largest logit is that of the label."""
    return {"accuracy": (logits_of(outputs).argmax(-1) == labels_of(batch)).float().mean()}


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a model's outputs.

    They are the outputs themselves, their attribute or entry ``logits``, the entry ``out`` of torchvision's
    segmentation models, or the first of a tuple such as (logits, lengths).

    Raises:
        SpecError: the outputs have no logits.
    """
    logits = getattr(outputs, "logits", outputs)
    if isinstance(logits, Mapping):
        logits = next((logits[name] for name in ("logits", "out") if name in logits), logits)
    elif isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        names = f" with {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise SpecError(
            f"outputs must be logits, (logits, lengths) or have .logits; received {type(outputs).__name__}{names}. Let "
            "the model, or forward(model, batch), return them."
        )
    return logits


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]  # type: ignore[no-any-return]
