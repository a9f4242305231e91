"""Evaluation: mean loss and metrics of a set."""

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
    """The three functions of a task.

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
    """A set with functions of its own, for another head or other labels.

    Args:
        data: any data that ``fit`` takes.
        forward: replaces the run's forward; None: the run's.
        loss: replaces the run's loss; None: the run's.
        metrics: replaces the run's metrics; None: the run's.

    Example:
        >>> import torch, conservtl as ctl
        >>> data = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        >>> held_out = ctl.Holdout(data, metrics=lambda outputs, batch: {"norm": outputs.norm()})
    """

    data: Any
    forward: Forward | None = None
    loss: Loss | None = None
    metrics: Metrics | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, functions: Functions, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """Return the mean loss and metrics of a set; modes and random generators are restored.

    Args:
        model: evaluated in eval mode, on ``device``.
        data: any data that ``fit`` takes, or a ``Holdout``.
        functions: the run's functions.
        device: device of the batches.
        batch_size: examples per batch, for data that is not batched yet.

    Returns:
        Name of each metric, and ``loss`` -> value.

    Raises:
        DataError: the set is empty.
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
        raise DataError("a set to evaluate on has no examples. Leave it out, or give it some.")
    return pool.result()
