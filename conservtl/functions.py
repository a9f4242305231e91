"""What a task is by default: classification of (inputs, labels), or of a dictionary with ``labels``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["Forward", "Loss", "Metrics", "accuracy", "cross_entropy", "forward", "labels_of", "logits_of"]

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]
Metrics = Callable[[Any, Any], Mapping[str, "Tensor | float"]]


def forward(model: nn.Module, batch: Any) -> Any:
    """Outputs for a batch: (inputs, labels), or a dictionary with ``labels`` beside the model's arguments."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0])


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of logits (N, classes) and labels (N,)."""
    return F.cross_entropy(logits_of(outputs), labels_of(batch))


def accuracy(outputs: Any, batch: Any) -> dict[str, Tensor]:
    """Share of examples whose largest logit is at the label."""
    return {"accuracy": (logits_of(outputs).argmax(-1) == labels_of(batch)).float().mean()}


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's outputs: a tensor, or what stands under ``logits``."""
    logits = getattr(outputs, "logits", outputs)
    if isinstance(logits, Mapping):
        logits = logits["logits"]
    return logits  # type: ignore[no-any-return]


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]  # type: ignore[no-any-return]
