"""Evaluation: mean loss and metrics over a set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conservtl.engine.batching import as_batches
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import DataError
from conservtl.functions import Forward, Loss, MetricPool, Metrics
from conservtl.runtime.preserve import eval_mode

__all__ = ["Functions", "Holdout", "evaluate"]


@dataclass(frozen=True)
class Functions:
    """The three functions that make a task.

    Args:
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        metrics: (outputs, batch) -> name: mean over the batch, or (sum, count), pooled over a set.
    """

    forward: Forward
    loss: Loss
    metrics: Metrics


@dataclass(frozen=True)
class Holdout:
    """A set to evaluate on in another way than the training set: another head, other labels.

    Args:
        data: whatever ``fit`` takes as data.
        forward: replaces the run's forward.
        loss: replaces the run's loss.
        metrics: replaces the run's metrics.
    """

    data: Any
    forward: Forward | None = None
    loss: Loss | None = None
    metrics: Metrics | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, functions: Functions, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """Mean loss and metrics over a set; the mode of every module, and every random generator, is left as found.

    Args:
        model: evaluated in eval mode, on ``device``.
        data: whatever ``fit`` takes as data, or a ``Holdout``.
        functions: the run's functions.
        device: where batches are moved.
        batch_size: where batches are made here.

    Raises:
        DataError: there is nothing in it.
    """
    if isinstance(data, Holdout):
        functions = Functions(
            data.forward or functions.forward, data.loss or functions.loss, data.metrics or functions.metrics
        )
        data = data.data
    pool, seen = MetricPool(), 0
    with eval_mode(model), preserve_rng():  # a DataLoader draws a seed even when it does not shuffle
        for batch in as_batches(data, batch_size, device, shuffle=False).epoch():
            outputs = functions.forward(model, batch.content)
            loss = functions.loss(outputs, batch.content)
            pool.add({"loss": loss, **functions.metrics(outputs, batch.content)}, batch.size)
            seen += batch.size
    if not seen:
        raise DataError("a set to evaluate on has no examples; leave it out or give some.")
    return pool.result()
