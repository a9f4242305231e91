"""Losses as users pass them: functions of (outputs, batch), and torch's own of (outputs, labels)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError
from conservtl.functions import IGNORED, Loss, classes_of, cross_entropy, labels_of, logits_of

__all__ = ["LabelLoss", "as_loss", "check_trained", "counted", "counts_positions"]

_LABELS = {"target", "targets", "label", "labels", "y", "y_true", "true", "truth", "gt"}
_CLASSES = {"CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss"}
_ELEMENTS = {
    *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss", "SoftMarginLoss"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "sigmoid_focal_loss"),
}
_LIBRARIES = ("torch.nn.functional", "torchvision.ops.focal_loss")


def as_loss(loss: Any) -> Loss:
    """Return a loss as a function of (outputs, batch).

    A loss of torch, such as ``nn.CrossEntropyLoss(label_smoothing=0.1)`` or ``F.mse_loss``, and a module whose second
    argument is named ``target`` or ``labels``, gets the logits and labels. Every other function gets outputs and batch.

    Raises:
        SpecError: it cannot be called, or is a class, a sum, or a module without values (on the meta device).
    """
    if isinstance(loss, LabelLoss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        received = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
        raise SpecError(
            f"loss must be a function of (outputs, batch), or a loss of torch such as nn.MSELoss(); received "
            f"{received}. {'Make one of it: add ().' if isinstance(loss, type) else 'Pass one.'}"
        )
    if isinstance(loss, nn.Module):
        if any(tensor.is_meta for tensor in (*loss.parameters(), *loss.buffers())):
            raise SpecError(
                f"loss: {type(loss).__name__} has tensors on the meta device, which hold no values. Make it on a "
                "CPU or GPU."
            )
        return LabelLoss(loss, of_labels=_takes_labels(loss))
    inner = loss
    while isinstance(inner, partial):
        inner = inner.func
    if isinstance(inner, nn.Module) or getattr(inner, "__module__", "") in _LIBRARIES:
        return LabelLoss(loss, of_labels=True)
    return cast("Loss", loss)


def check_trained(loss: Any, trained: Iterable[nn.Parameter]) -> None:
    """Raise unless every parameter of a loss that asks for a gradient belongs to the model."""
    module = loss.loss if isinstance(loss, LabelLoss) else None
    if not isinstance(module, nn.Module):
        return
    known = {id(parameter) for parameter in trained}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise SpecError(
                f"loss: nothing would train {name!r} of {type(module).__name__}, because it is no parameter of the "
                "model. Make the loss a part of the model before adapt, or call requires_grad_(False) on it."
            )


def _takes_labels(module: nn.Module) -> bool:
    if type(module).__module__ == "torch.nn.modules.loss":
        return True
    parameters = list(inspect.signature(module.forward).parameters)
    return len(parameters) > 1 and parameters[1].lower() in _LABELS


def counts_positions(loss: Loss) -> bool:
    """Return whether a loss is a mean over the positions of classes that count, all with the same weight."""
    return loss is cross_entropy or (isinstance(loss, LabelLoss) and loss.of_classes and not loss.weighted)


def counted(loss: Loss, outputs: Any, batch: Any) -> Tensor | None:
    """Return the number of positions that a loss of classes is the mean over; None if it is another loss's mean.

    A batch with few labels other than those ignored counts less in the loss of a set.
    """
    if not counts_positions(loss):
        return None
    ignored = loss.ignored if isinstance(loss, LabelLoss) else IGNORED
    labels = classes_of(outputs, batch, ignored)[1]
    return None if labels.is_floating_point() else (labels != ignored).sum()


class LabelLoss:
    """A loss module or a loss of torch as a function of (outputs, batch); moves itself to the outputs' device.

    Labels of a loss of classes and of a loss of numbers are brought into the form that torch takes: whole numbers of
    any type for classes, the outputs' type and shape for numbers.

    Args:
        loss: the module or function.
        of_labels: whether it takes (logits, labels) instead of (outputs, batch).
    """

    def __init__(self, loss: Callable[..., Tensor], of_labels: bool) -> None:
        self.loss, self.of_labels = loss, of_labels
        inner = loss
        while isinstance(inner, partial):
            inner = inner.func
        name = type(inner).__name__ if isinstance(inner, nn.Module) else getattr(inner, "__name__", "")
        self.name = name
        own = type(inner).__module__ == "torch.nn.modules.loss" or getattr(inner, "__module__", "") in _LIBRARIES
        self.of_classes = own and of_labels and name in _CLASSES
        self.of_elements = own and of_labels and name in _ELEMENTS
        keywords = getattr(loss, "keywords", {})
        self.ignored = int(keywords.get("ignore_index", getattr(inner, "ignore_index", -100)))
        self.weighted = keywords.get("weight", getattr(inner, "weight", None)) is not None
        if own and keywords.get("reduction", getattr(inner, "reduction", None)) == "sum":
            raise SpecError(
                f"loss: {name} must be the mean over a batch; received reduction='sum', whose scale changes with the "
                "batch. Leave it out, and set the learning rate instead."
            )
        self._device: torch.device | None = None

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss."""
        if not self.of_labels:
            return self._placed(outputs)(outputs, batch)
        logits, labels = logits_of(outputs), labels_of(batch)
        loss = self._placed(logits)
        if self.of_classes:
            return loss(*classes_of(outputs, batch, self.ignored))
        return loss(logits, self._matched(logits, labels) if self.of_elements else labels)

    def _matched(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return labels of the outputs' type and shape."""
        if labels.shape != outputs.shape:
            trimmed = [tuple(one.shape[:-1] if one.shape[-1:] == (1,) else one.shape) for one in (outputs, labels)]
            if trimmed[0] != trimmed[1]:
                raise SpecError(
                    f"loss: {self.name} compares outputs with labels of the same shape; received outputs "
                    f"{tuple(outputs.shape)} and labels {tuple(labels.shape)}. Give the model as many outputs as an "
                    "example has labels, or pass a loss of classes such as nn.CrossEntropyLoss()."
                )
        return labels.reshape(outputs.shape).to(outputs.dtype)

    def _placed(self, outputs: Any) -> Callable[..., Tensor]:
        if isinstance(self.loss, nn.Module) and isinstance(outputs, Tensor) and outputs.device != self._device:
            self.loss.to(outputs.device)
            self._device = outputs.device
        return self.loss
