"""Classifiers that are fitted to a trained model's features and written into its head."""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.bounds import Positive
from conservtl.errors import DataError, SpecError
from conservtl.extras import require
from conservtl.functions import Forward, labels_of, logits_of
from conservtl.layers import unwrap
from conservtl.layers.names import named_modules
from conservtl.methods.feature_extraction.probe_head import ProbeHead
from conservtl.plan.decision import After, FinishContext
from conservtl.runtime.layer_features import pooled
from conservtl.runtime.measuring import Placed
from conservtl.runtime.preserve import eval_mode

__all__ = ["Classifier", "FittedHead", "RowStore", "nearest_means"]

Classifier = Literal["svm", "logistic", "ncm"]

_BLOCK = 4096  # rows of a mapped matrix to read at a time
_ROUNDING = 1e-2  # of the largest score; if the model's outputs are not its head's, they differ by far more
_STEPS = 10_000

Scores = tuple[Any, Any]
"""Weight (classes, D) and bias (classes,) of linear scores, arrays in double precision."""


class FittedHead(After):
    """Replace the head's values by a classifier that is fitted to its input."""

    kind: Literal["fitted_head"] = "fitted_head"
    classifier: Classifier
    """Classifier to fit."""
    C: Positive | None = None
    """Weight of the loss relative to the regularisation. None: no regularisation, for class means."""
    head: str
    """Name of the head's module."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        names = {"svm": "a linear SVM", "logistic": "a logistic regression", "ncm": "the nearest class mean"}
        strength = "" if self.C is None else f" (C = {self.C:g})"
        return f"{self.head} becomes {names[self.classifier]}{strength}, fitted to the features of the training data"

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Compute the features of each example once, fit the classifier, and write it into the head."""
        if ending.batches is None:
            raise SpecError(f"{self.by} fits its classifier to the training data: pass its batches, finish(batches).")
        model = unwrap(ending.model)
        head: Any = named_modules(model)[self.head]
        features, labels = _gathered(*self._features(model, head, ending.batches, ending.forward))
        self._check_classes(labels, len(head.weight))
        facts = {"classifier": self.classifier, "examples": len(features), "features": features.shape[1]}
        strength = self.C
        if strength is None:
            weight, bias = nearest_means(features, labels)
        else:
            fitted = _standardised(features, lambda x: _fit(self.classifier, x, labels, strength))
            weight, bias, facts["converged"] = fitted
            facts["C"] = strength
        head.weight.copy_(torch.from_numpy(weight).view(head.weight.shape))
        head.bias.copy_(torch.from_numpy(bias))
        return facts

    def _features(self, model: nn.Module, head: Any, batches: Iterable[Any], forward: Forward) -> tuple[Any, Any]:
        """Return the features (N, D) and labels (N,) of all batches, with the model in eval mode."""
        rows = RowStore()
        labels: list[Tensor] = []
        entered: list[Tensor] = []
        catch = head.register_forward_pre_hook(lambda _, inputs: entered.append(_entering(head, inputs[0])))
        with catch, eval_mode(model):
            for batch in Placed(batches, head.weight.device):
                entered.clear()
                outputs = forward(model, batch)
                targets = self._labels(batch)
                if not labels:
                    self._check_head(model, head, outputs, entered, len(targets))
                rows.add(entered[0])
                labels.append(targets.cpu())
        if not labels:
            raise DataError(f"{self.by}: there are no batches to fit a classifier to. Give some.")
        return rows.matrix(), torch.cat(labels).numpy()

    def _labels(self, batch: Any) -> Tensor:
        labels = labels_of(batch)
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            received = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
            raise DataError(
                f"{self.by}: classifier={self.classifier!r} needs one class for each example, integers of shape (N,); "
                f"received {received}. Use classifier='linear' for other targets."
            )
        return labels

    def _check_head(self, model: nn.Module, head: Any, outputs: Any, entered: list[Tensor], size: int) -> None:
        """Raise unless the model's scores are linear in the head's input, up to an offset that all classes share."""
        scores = logits_of(outputs)
        by_example = len(entered) == 1 and entered[0].ndim == 2 and len(entered[0]) == size
        if by_example and isinstance(scores, Tensor) and scores.shape == (size, len(head.weight)):
            expected = F.linear(entered[0], head.weight.flatten(1), head.bias)
            difference = (scores - scores.mean(1, keepdim=True)) - (expected - expected.mean(1, keepdim=True))
            if bool(difference.abs().max() <= _ROUNDING * expected.abs().max()):
                return
        raise SpecError(
            f"{self.by}: classifier={self.classifier!r} is written into {self.head!r}, so the outputs of "
            f"{type(model).__name__} must be that head's, linear in its input, with an example a row; they are not. "
            "Use classifier='linear'."
        )

    def _check_classes(self, labels: Any, classes: int) -> None:
        counts = np.bincount(labels, minlength=classes) if labels.min() >= 0 else np.zeros(0)
        if len(counts) != classes or classes < 2:
            raise DataError(
                f"{self.by}: a classifier needs two classes or more, and labels from 0 to {classes - 1} as the head "
                f"has outputs; received {labels.min()} to {labels.max()}."
            )
        if missing := np.flatnonzero(counts == 0).tolist():
            raise DataError(
                f"{self.by}: every class of the head needs an example to fit classifier={self.classifier!r} to; "
                f"classes {missing} of {classes} have none. Give some, or build the model without them."
            )


def nearest_means(features: Any, labels: Any) -> Scores:
    """Return scores that rank classes by the distance to their means m: 2 m.x - |m|².

    Args:
        features: (N, D).
        labels: (N,) classes; every class occurs.
    """
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), features.shape[1]))
    for rows in _blocks(len(features)):
        sums += np.eye(len(counts))[labels[rows]].T @ features[rows]
    means = sums / counts[:, None]
    return 2 * means, -np.square(means).sum(1)


def _fit(classifier: str, features: Any, labels: Any, strength: float) -> tuple[Any, Any, bool]:
    """Return weight, bias, and whether the solver converged."""
    if classifier == "svm":
        make = require("sklearn.svm", "experiments").LinearSVC
        model = make(C=strength, max_iter=_STEPS, random_state=0)
    else:
        make = require("sklearn.linear_model", "experiments").LogisticRegression
        model = make(C=strength, max_iter=_STEPS)
    unfinished = require("sklearn.exceptions", "experiments").ConvergenceWarning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", unfinished)
        model.fit(features, labels)
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(weight) == 1:  # scikit-learn gives two classes one row; two rows with the same margin
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias, not any(issubclass(warning.category, unfinished) for warning in caught)


def _standardised(features: Any, fit: Callable[[Any], tuple[Any, Any, bool]]) -> tuple[Any, Any, bool]:
    """Fit to features scaled to mean 0 and variance 1, and return weight and bias for the features as they are.

    Args:
        features: (N, D), changed in place.
        fit: scaled features -> weight, bias, and whether the solver converged.
    """
    blocks = list(_blocks(len(features)))
    mean = sum(features[rows].sum(0, dtype=np.float64) for rows in blocks) / len(features)
    variance = sum(np.square(features[rows] - mean).sum(0) for rows in blocks) / len(features)
    scale = np.sqrt(variance)
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0  # constant but for rounding
    scale[scale == 0] = 1.0
    for rows in blocks:
        features[rows] = (features[rows] - mean) / scale
    weight, bias, converged = fit(features)
    weight = weight / scale
    return weight, bias - weight @ mean, converged


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, length, _BLOCK))


def _entering(head: Any, entered: Tensor) -> Tensor:
    """Return the features (N, D) in a head's input."""
    if isinstance(head, ProbeHead):
        return head.features(entered)
    return pooled(entered, 1) if head.weight.ndim > 2 else entered


def _gathered(features: Any, labels: Any) -> tuple[Any, Any]:
    """Gather features and labels of all processes, so that each fits the same classifier."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return features, labels
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (features, labels))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


_LIMIT = 2 << 30  # bytes


class RowStore:
    """A matrix that grows by rows.

    Args:
        limit: bytes to keep in memory. Above it all rows are written to an unnamed temporary file, which is deleted
            with the matrix.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._buffer: list[Any] = []
        self._shape = (0, 0)
        self._file: Any = None

    def add(self, rows: Tensor) -> None:
        """Append rows (n, D); half precision becomes single."""
        wide = rows.detach() if rows.itemsize >= 4 else rows.detach().float()
        self._buffer.append(np.ascontiguousarray(wide.cpu().numpy()))
        self._shape = (self._shape[0] + len(wide), wide.shape[1])
        self._dtype = self._buffer[-1].dtype
        if self._dtype.itemsize * self._shape[0] * self._shape[1] > self._limit:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="conservtl-")  # noqa: SIM115 - closed with this object
                weakref.finalize(self, self._file.close)
            for block in self._buffer:
                self._file.write(block.data)
            self._buffer = []

    def matrix(self) -> Any:
        """Return all rows as a writable array."""
        if self._file is None:
            return np.concatenate(self._buffer)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r+", shape=self._shape)
