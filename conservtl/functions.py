"""Default forward, loss and metrics: classification of (inputs, labels), or of a dictionary with ``labels``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import SpecError
from conservtl.labels import call_with
from conservtl.padding import find_padding, padding_of_outputs

__all__ = [
    "IGNORED",
    "Forward",
    "Loss",
    "MetricPool",
    "Metrics",
    "accuracy",
    "classes_of",
    "cross_entropy",
    "forward",
    "inputs_of",
    "labels_of",
    "logits_of",
]

IGNORED = -100
"""Label of a position that does not count, as in torch's cross-entropy."""

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
            total, count = value if isinstance(value, (tuple, list)) else (value * size, size)
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def totals(self) -> dict[str, tuple[float, float]]:
        """Return (sum, count) of each metric, for another pool to add."""
        return {name: (float(total), float(self._counts[name])) for name, total in self._sums.items()}

    def result(self) -> dict[str, float]:
        """Return the metrics of all batches together; NaN for a count of 0."""
        counts = {name: float(count) for name, count in self._counts.items()}
        return {name: float(total) / counts[name] if counts[name] else math.nan for name, total in self._sums.items()}


def forward(model: nn.Module, batch: Any) -> Any:
    """Return the model's outputs for (inputs, labels), or for a dictionary of its arguments and ``labels``.

    Several inputs are a tuple or list, as a ``DataLoader`` makes of ((a, b), label). Labels in a dictionary reach a
    model that needs them (``conservtl.labels``), and no other.
    """
    return call_with(model, batch if isinstance(batch, Mapping) else batch[0])


def inputs_of(batch: Any) -> Any:
    """Return what a model is called with: the first of a tuple, or a dictionary without its ``labels``."""
    return {key: one for key, one in batch.items() if key != "labels"} if isinstance(batch, Mapping) else batch[0]


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of logits and labels.

    Labels are class indices of any whole type, (N,) or (N, 1), or probabilities or one-hot rows of the logits' shape.
    For logits with positions, (N, frames, classes) or (N, classes, ...) with labels (N, ...), the mean is over
    positions that count: labels of -100 do not, nor does padding that the outputs' lengths or the batch name, if no
    label is -100.

    Raises:
        SpecError: the labels are no classes of the logits, as in regression.
    """
    logits, labels = classes_of(outputs, batch)
    if logits.ndim < 3 or labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    mean: Tensor = total / (labels != IGNORED).sum().clamp(min=1)
    return mean


def classes_of(outputs: Any, batch: Any, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes, ...) and labels as a loss of classes takes them, those of padding ``ignored``.

    Raises:
        SpecError: the labels are no classes of the logits.
    """
    logits = logits_of(outputs)
    labels = _class_labels(logits, labels_of(batch))
    if logits.ndim < 3 or labels.is_floating_point():
        return logits, labels
    last, second = labels.shape == logits.shape[:-1], labels.shape == logits.shape[:1] + logits.shape[2:]
    # If both fit, torch's layout, but for outputs of Hugging Face models.
    axis = logits.ndim - 1 if last and (not second or hasattr(outputs, "logits")) else 1
    padding = padding_of_outputs(outputs) or (find_padding(batch) if isinstance(batch, Mapping) else None)
    if padding is not None and (padding.sizes is None or labels.shape[-1] in padding.sizes):
        mask = padding.mask(logits.shape, axis, "the labels")
        if mask is not None:
            labels = labels.masked_fill(~mask & (labels != ignored).all(), ignored)
    return logits.movedim(axis, 1), labels


def _class_labels(logits: Tensor, labels: Any) -> Tensor:
    """Return labels as torch's cross-entropy takes them: int64 indices, or probabilities of the logits' type."""
    if not isinstance(labels, Tensor):
        raise SpecError(
            f"labels must be a tensor of classes; received {type(labels).__name__}. Pass tensors or NumPy arrays."
        )

    def received() -> str:
        return f"received outputs {tuple(logits.shape)} and {str(labels.dtype)[6:]} labels {tuple(labels.shape)}"

    if logits.ndim < 2:
        raise SpecError(
            f"outputs must be (N, classes) for a cross-entropy; {received()}. For numbers pass loss=nn.MSELoss(), for "
            "yes or no loss=nn.BCEWithLogitsLoss()."
        )
    if logits.ndim == 2 and logits.shape[1] == 1:
        raise SpecError(
            f"outputs must have two classes or more for a cross-entropy, which is 0 for one whatever the label; "
            f"{received()}. For numbers pass loss=nn.MSELoss(), for yes or no loss=nn.BCEWithLogitsLoss()."
        )
    if labels.is_complex():
        raise SpecError(f"labels must be classes; {received()}. Give whole numbers.")
    if labels.shape == logits.shape and (labels.is_floating_point() or logits.ndim == 2):
        return labels.to(logits.dtype)
    if labels.is_floating_point():
        raise SpecError(
            f"labels must be whole numbers, or probabilities of the outputs' shape, for a cross-entropy; {received()}. "
            "For classes pass labels.long(), for numbers loss=nn.MSELoss()."
        )
    if logits.ndim == 2:
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.shape != logits.shape[:1]:
            raise SpecError(
                f"labels must be one class an example, (N,), or one-hot rows of the outputs' shape; {received()}. For "
                "several labels an example pass loss=nn.BCEWithLogitsLoss()."
            )
    classes: Tensor = labels.long()
    return classes


def accuracy(outputs: Any, batch: Any) -> dict[str, MetricValue]:
    """Return the accuracy: the share of examples whose largest logit is that of the label.

    It is defined for logits (N, classes) and integer labels (N,) or (N, 1), without those of -100; for others nothing
    is returned, and the loss is the measure.
    """
    try:
        logits, labels = logits_of(outputs), labels_of(batch)
    except (SpecError, LookupError, TypeError):
        return {}
    if not isinstance(labels, Tensor):
        return {}
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if not _are_classes(logits, labels):
        return {}
    right = logits.argmax(-1) == labels
    counted = labels != IGNORED
    if bool(counted.all()):
        return {"accuracy": right.float().mean()}
    return {"accuracy": (right.sum(), counted.sum())}


def _are_classes(logits: Tensor, labels: Tensor) -> bool:
    """Whether labels are class indices of logits (N, classes)."""
    indices = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return indices and labels.ndim == 1 and logits.ndim == 2 and logits.shape[1] > 1 and len(logits) == len(labels)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a model's outputs.

    They are the outputs themselves, their attribute or entry ``logits``, the entry ``out`` of torchvision's
    segmentation models, or the first of a tuple such as (logits, lengths).

    Raises:
        SpecError: the outputs have no logits.
    """
    logits = getattr(outputs, "logits", outputs)
    if isinstance(logits, Tensor):
        return logits
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


def check_blank(by: str, blank: int | None, outputs: Any) -> None:
    """Raise if a class is called the blank of outputs that have none: those whose attribute ``blank`` is None."""
    if blank is not None and getattr(outputs, "blank", blank) is None:
        raise SpecError(
            f"{by}: blank is an output of CTC, and a decoder has none; received {blank}. Set it to null, or name the "
            "strategy by its kind where a short name presets it."
        )


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]  # type: ignore[no-any-return]
