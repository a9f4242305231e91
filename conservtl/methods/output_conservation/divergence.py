"""Divergences of outputs to the source's: of classes, of independent labels, of numbers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.padding.masked import comparable, masked_mean

__all__ = ["cross_entropy_to_source", "kl_to_source", "squared_to_source"]


def cross_entropy_to_source(
    logits: Tensor,
    source: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    axis: int | None = -1,
    sigmoid: bool = False,
) -> Tensor:
    """Return T² × cross-entropy of softmax(logits / T) against softmax(source / T), the mean over positions.

    The factor T² keeps its gradient at the scale of the task's (Hinton et al. 2015, section 2).

    Args:
        logits: (N, classes), (N, frames, classes) or (N, classes, ...) of the adapted model.
        source: logits of the source model, the same shape; no gradient reaches them.
        temperature: T.
        mask: shape of the logits without the class axis, false for positions that do not count. None: all count.
        axis: the class axis; None with ``sigmoid``: every element is a position.
        sigmoid: whether each logit is a label of its own: the mean over labels of T² × the cross-entropy of
            sigmoid(logit / T) against sigmoid(source / T).
    """
    logits, source = comparable(logits, source, mask, axis)
    if sigmoid:
        target = (source / temperature).sigmoid()
        values = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
        return temperature**2 * masked_mean(_over_labels(values, axis), mask)
    classes = -1 if axis is None else axis
    target = (source / temperature).softmax(classes)
    return temperature**2 * masked_mean(-(target * (logits / temperature).log_softmax(classes)).sum(classes), mask)


def kl_to_source(
    logits: Tensor,
    source: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    axis: int | None = -1,
    sigmoid: bool = False,
) -> Tensor:
    """Return T² × KL(softmax(source / T) || softmax(logits / T)); arguments as for ``cross_entropy_to_source``."""
    logits, source = comparable(logits, source, mask, axis)
    if sigmoid:
        target, adapted = source / temperature, logits / temperature
        chosen = target.sigmoid() * (F.logsigmoid(target) - F.logsigmoid(adapted))
        rejected = (-target).sigmoid() * (F.logsigmoid(-target) - F.logsigmoid(-adapted))
        return temperature**2 * masked_mean(_over_labels(chosen + rejected, axis), mask)
    classes = -1 if axis is None else axis
    target = (source / temperature).log_softmax(classes)
    adapted = (logits / temperature).log_softmax(classes)
    return temperature**2 * masked_mean((target.exp() * (target - adapted)).sum(classes), mask)


def squared_to_source(
    outputs: Tensor, source: Tensor, mask: Tensor | None = None, *, axis: int | None = None
) -> Tensor:
    """Return the mean of (outputs - source)² over elements; arguments as for ``cross_entropy_to_source``."""
    outputs, source = comparable(outputs, source, mask, axis)
    return masked_mean(_over_labels((outputs - source).square(), axis), mask)


def _over_labels(values: Tensor, axis: int | None) -> Tensor:
    return values if axis is None else values.mean(axis)
