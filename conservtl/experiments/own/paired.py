"""Functions of a task that score a model and the source model on the same batches, and compare their answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from conservtl.engine.evaluation import Functions, check_metrics
from conservtl.functions import IGNORED, Forward, Loss, accuracy, classes_of, cross_entropy, logits_of
from conservtl.labels import labels_for_loss
from conservtl.losses import LabelLoss, counted

__all__ = ["BEFORE", "SHARED", "Pair", "named"]

BEFORE, SHARED = "before ", "shared "
"""What the names of metrics begin with while they are pooled: those of the source, and those of the agreement."""


class Pair:
    """Functions of (model, batch) that score a model and the source model on the same batch.

    Args:
        functions: of the set.
        start: the source as it is; None: it has no score on the set.
        heads: the source's heads that replace the model's own.
        compared: the source model, and its heads that replace the model's own, to compare outputs; None: they are not.
    """

    def __init__(
        self,
        functions: Functions,
        start: nn.Module | None,
        heads: Any,
        compared: tuple[nn.Module, Any] | None,
    ) -> None:
        self.functions, self.start, self.heads, self.compared = functions, start, heads, compared
        self._first = True
        self._outputs: Any = None
        self._shared: tuple[Any, Any] | None = None

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs with the present weights, and keep those of the source."""
        own = self.functions
        if self.start is not None and self._first:
            labels_for_loss(self.start, batch, own.forward, own.loss)
        self._first = False
        outputs = _with_heads(self.heads, model, own.forward, batch)
        self._outputs = None if self.start is None else own.forward(self.start, batch)
        self._shared = None
        if self.compared is not None:
            source, heads = self.compared
            theirs = self._outputs if self.start is source else own.forward(source, batch)
            self._shared = (_with_heads(heads, model, own.forward, batch) if heads else outputs), theirs
        return outputs

    @property
    def loss(self) -> Loss:
        """The loss of the set."""
        return self.functions.loss

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Any]:
        """Return the metrics of the present weights, those of the source, and how far both agree."""
        own = self.functions
        found: dict[str, Any] = dict(_checked(own.metrics(outputs, batch)))
        if self.start is not None:
            theirs = _checked(own.metrics(self._outputs, batch))
            loss, count = own.loss(self._outputs, batch), counted(own.loss, self._outputs, batch)
            found[f"{BEFORE}loss"] = loss if count is None else (loss * count, count)
            found |= {f"{BEFORE}{name}": value for name, value in theirs.items()}
        if self._shared is not None:
            found |= {f"{SHARED}{name}": value for name, value in _agreement(*self._shared, batch, own.loss).items()}
        return found


def _agreement(adapted: Any, source: Any, batch: Any, loss: Loss) -> dict[str, tuple[Tensor, int]]:
    """Return the agreement of two models' answers and KL(source || adapted), as sums over positions that count."""
    of_classes = loss is cross_entropy or (isinstance(loss, LabelLoss) and loss.of_classes)
    if not of_classes and not accuracy(adapted, batch):
        return {}
    ignored = loss.ignored if isinstance(loss, LabelLoss) else IGNORED
    if not of_classes:
        scores, labels, theirs = logits_of(adapted), None, logits_of(source)
    else:
        (scores, labels), (theirs, _) = classes_of(adapted, batch, ignored), classes_of(source, batch, ignored)
    if scores.shape != theirs.shape:
        return {}
    scores, theirs = (one.movedim(1, -1).flatten(0, -2).float().log_softmax(-1) for one in (scores, theirs))
    if labels is not None and not labels.is_floating_point():
        counts = labels.flatten() != ignored
        scores, theirs = scores[counts], theirs[counts]
    same = (scores.argmax(-1) == theirs.argmax(-1)).sum()
    kl = (theirs.exp() * (theirs - scores)).sum().clamp(min=0)
    return {"agreement": (same, len(scores)), "kl": (kl, len(scores))}


def _with_heads(heads: Any, model: nn.Module, forward: Forward, batch: Any) -> Any:
    """Return the outputs of a model with the source's heads."""
    with ExitStack() as stack:
        for head in heads:
            model = stack.enter_context(head.replacing(model))
        return forward(model, batch)


def named(found: Mapping[str, float], start: str) -> dict[str, float]:
    """Return the metrics whose names begin with ``start``, without it."""
    return {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}


def _checked(metrics: Any) -> Mapping[str, Any]:
    check_metrics(metrics)
    return metrics  # type: ignore[no-any-return]
