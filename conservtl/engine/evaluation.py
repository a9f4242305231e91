"""Evaluation: mean loss and metrics of a set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.engine.batch import Batch, Batches, examples_of
from conservtl.engine.batching import as_batches
from conservtl.engine.divergence import Glance, glance
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import DataError, SpecError, TrainingDivergedError
from conservtl.functions import Forward, Loss, MetricPool, Metrics
from conservtl.labels import labels_for_loss
from conservtl.losses import as_loss, counted
from conservtl.runtime.preserve import eval_mode

__all__ = ["NO_EXAMPLES", "Functions", "Holdout", "check_metrics", "evaluate"]

NO_EXAMPLES = "a set to evaluate on has no examples. Leave it out, or give it some."


@dataclass(frozen=True)
class Functions:
    """The three functions of a task.

    Args:
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch; or a loss of torch, such as ``nn.MSELoss()``.
        metrics: (outputs, batch) -> name: mean over the batch, or (sum, count), pooled over a set.

    Raises:
        SpecError: one is none.
    """

    forward: Forward
    loss: Loss
    metrics: Metrics

    def __post_init__(self) -> None:
        signatures = {"forward": "(model, batch) -> outputs", "metrics": "(outputs, batch) -> {name: value}"}
        for name, signature in signatures.items():
            if not callable(given := getattr(self, name)):
                raise SpecError(
                    f"{name} must be a function; received {given!r:.60}. Pass one, {signature}, or leave it out."
                )
        object.__setattr__(self, "loss", as_loss(self.loss))

    def of(self, data: Any) -> Functions:
        """Return the functions of a set: those that a ``Holdout`` brings instead of the run's."""
        if not isinstance(data, Holdout):
            return self
        return Functions(data.forward or self.forward, data.loss or self.loss, data.metrics or self.metrics)


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
    model: nn.Module,
    data: Any,
    functions: Functions,
    device: torch.device,
    batch_size: int = 256,
    selects: str | None = None,
) -> dict[str, float]:
    """Return the mean loss and metrics of a set; modes and random generators are restored.

    Args:
        model: evaluated in eval mode, on ``device``.
        data: any data that ``fit`` takes, or a ``Holdout``.
        functions: the run's functions.
        device: device of the batches.
        batch_size: examples per batch, for data that is not batched yet.
        selects: name of the set if weights are selected on it, so that its loss must be finite; None: they are not.

    Raises:
        DataError: the set is empty.
        SpecError: metrics are no numbers by name.
        TrainingDivergedError: the loss of a set that selects is NaN or infinite; the message names the batch.
    """
    functions = functions.of(data)
    data = data.data if isinstance(data, Holdout) else data
    pool = MetricPool()
    losses: list[tuple[Tensor, Batch, Glance | None]] = []
    batches = as_batches(data, batch_size, device, shuffle=False)
    with eval_mode(model), preserve_rng():  # a DataLoader draws a seed even when it does not shuffle
        for batch in batches.epoch():
            if not losses:
                labels_for_loss(model, batch.content, functions.forward, functions.loss)
            outputs = functions.forward(model, batch.content)
            if not batch.size:  # other processes have a batch, and may wait for this one's parameters
                continue
            loss = functions.loss(outputs, batch.content)
            metrics = functions.metrics(outputs, batch.content)
            check_metrics(metrics)
            count = counted(functions.loss, outputs, batch.content)
            pool.add({"loss": loss if count is None else (loss * count, count), **metrics}, batch.size)
            seen = None if selects is None else glance(batch, batch.content)
            losses.append((torch.as_tensor(loss).detach(), replace(batch, content=None), seen))  # its memory is free
    fault = None if selects is None else _not_finite(losses, selects, batches)
    if batches.processes.many:
        parts = batches.processes.gathered((pool.totals(), fault))
        pool = MetricPool()
        for totals, _ in parts:
            pool.add(totals, 0)
        fault = next((one for _, one in parts if one is not None), None)
    if not (result := pool.result()):
        raise DataError(NO_EXAMPLES)
    if fault is not None:
        raise TrainingDivergedError(fault)
    return result


def check_metrics(metrics: Any) -> None:
    """Raise unless metrics are numbers, or pairs (sum, count), by name."""
    if not isinstance(metrics, Mapping):
        raise SpecError(
            f"metrics must return a dictionary, name -> value; received {type(metrics).__name__}. Return, say, "
            "{'accuracy': value}."
        )
    for name, value in metrics.items():
        if not isinstance(name, str) or name == "loss":
            raise SpecError(f"metrics must have names other than 'loss', as text; received {name!r}. Rename it.")
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if len(parts) not in (1, 2) or not all(_is_number(part) for part in parts):
            raise SpecError(
                f"metrics must be numbers, or pairs (sum, count); {name!r} is {_shown(value)}. Return its mean over "
                "the batch, or a sum with its count."
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _not_finite(losses: Sequence[tuple[Tensor, Batch, Glance | None]], name: str, batches: Batches) -> str | None:
    """Return a message if the loss of a batch is not finite: a score would silently keep earlier weights."""
    for number, (loss, batch, seen) in enumerate(losses, 1):
        if not math.isfinite(value := float(loss)):
            found = None if seen is None else seen.wrong(batches)
            advice = "Inspect that batch, or lower training.lr or set training.clip if earlier evaluations were finite."
            return (
                f"the loss on the validation set {name!r} is {value} at its batch {number} of {len(losses)}"
                f"{examples_of(batch, ' (examples {})')}"
                + (
                    f". {advice}"
                    if found is None
                    else f", because {found} is not finite. Mend that input, or leave it out."
                )
            )
    return None
