"""Scores of a model on a set: the task's loss and metrics, with the outputs behind them for tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from conservtl.batches import batch_size as size_of
from conservtl.batches import map_tensors
from conservtl.data import Data
from conservtl.engine import Functions, Holdout, evaluate
from conservtl.engine.batch import Cut
from conservtl.engine.batching import as_batches
from conservtl.engine.processes import current
from conservtl.errors import SpecError
from conservtl.functions import MetricPool
from conservtl.runtime.source_model import SourceHead
from conservtl.tasks.base import Task

__all__ = ["Scores", "agreement", "answered", "in_order", "on_source_head", "score_model", "turned"]


@dataclass(frozen=True)
class Scores:
    """Metrics of a model on a set, and its outputs.

    Args:
        metrics: loss and the task's metrics over the set.
        outputs: of each batch, on the CPU.
        labels: classes of each batch, on the CPU; None each where the task has no classes.
        records: what the task records of each batch for a report.
        seconds: of work.
    """

    metrics: dict[str, float]
    outputs: tuple[Any, ...]
    labels: tuple[Any, ...]
    records: tuple[Any, ...] = ()
    seconds: float = 0.0

    def of(self, task: Task, places: Sequence[int]) -> Scores:
        """Return the scores with the outputs of these labels alone."""
        chosen = tuple(task.outputs_at(out, places) for out in self.outputs)
        return Scores(self.metrics, chosen, self.labels, self.records)


def score_model(task: Task, model: nn.Module, data: Data | Holdout, batch_size: int = 256) -> Scores:
    """Evaluate a model where it is; its modes and all random generators are left as found.

    Of several processes each evaluates a part, and the first gets all outputs, labels and records.
    """
    outputs: list[Any] = []
    labels: list[Any] = []
    records: list[Any] = []
    judge = data.metrics if isinstance(data, Holdout) and data.metrics is not None else task.metrics
    if isinstance(data, Holdout):
        data = replace(data, metrics=None)

    def metrics(out: Any, batch: Any) -> Mapping[str, Any]:
        outputs.append(map_tensors(out, _on_cpu))
        labels.append(map_tensors(task.labels(batch), _on_cpu))
        records.append(task.record(out, batch))
        return judge(out, batch)

    functions, processes = Functions(task.answer, task.loss, metrics), current()
    device = next(model.parameters()).device
    cut = Cut(batch_size * processes.world, shuffle=False, processes=processes)
    examples = data if isinstance(data, Holdout) else Holdout(data)
    shared = replace(examples, data=as_batches(examples.data, cut, device, shuffle=False))
    begun = time.perf_counter()
    pooled = evaluate(model, shared, functions, device)
    seconds = time.perf_counter() - begun
    divided = shared.data.processes  # batches that were not made here are evaluated whole by each process
    parts = divided.gathered_at_first((outputs, labels, records))
    outputs, labels, records = ([one for part in parts for one in part[place]] for place in range(3))
    return Scores(pooled, tuple(outputs), tuple(labels), tuple(records), seconds)


def agreement(task: Task, adapted: Scores, source: Scores) -> dict[str, float] | None:
    """Return how far a model's outputs agree with the source model's on the same set; None: the task has no measure."""
    pool = MetricPool()
    for out, reference in zip(adapted.outputs, source.outputs, strict=True):
        pool.add(task.agreement(out, reference), size_of(out))
    return pool.result() or None


def turned(task: Task, before: Scores, after: Scores) -> dict[str, int] | None:
    """Return how many answers of a set became better and worse; None: its examples are not judged one by one."""
    old, new = (task.errors(scores.outputs, after.labels, scores.records) for scores in (before, after))
    if old is None or new is None:
        return None
    pairs = list(zip(old, new, strict=True))
    return {"better": sum(a > b for a, b in pairs), "worse": sum(a < b for a, b in pairs), "of": len(pairs)}


def answered(task: Task, sets: Any) -> Any:
    """Return the sets that ``fit`` evaluates on, with the task's answers; a ``Holdout`` brings its own."""
    if type(task).answer is Task.answer or sets is None:
        return sets
    if not isinstance(sets, Mapping):
        return Holdout(sets, forward=task.answer)
    return {name: one if isinstance(one, Holdout) else Holdout(one, forward=task.answer) for name, one in sets.items()}


def in_order(task: Task, data: Data, order: Sequence[int]) -> Holdout:
    """Return a set on which the outputs of a model's labels stand in another order, that of the task."""

    def forward(model: nn.Module, batch: Any) -> Any:
        return task.outputs_at(task.answer(model, _renumbered(task, model, batch, order)), order)

    return Holdout(data, forward=forward, metrics=task.metrics)


def on_source_head(task: Task, data: Data, head: SourceHead) -> Holdout:
    """Return a set on which the source's own head replaces the model's."""

    def forward(model: nn.Module, batch: Any) -> Any:
        if task.reads_labels(model):
            raise SpecError(
                f"the source's data must have labels that the adapted {type(model).__name__} knows, because its "
                "decoder reads them; some are none of the target's. Keep the source's labels among the target's, or "
                "set source.data to null."
            )
        with head.replacing(model) as replaced:
            return task.answer(replaced, batch)

    return Holdout(data, forward=forward, metrics=task.metrics)


def _renumbered(task: Task, model: nn.Module, batch: Any, order: Sequence[int]) -> Any:
    """Return a batch whose labels have a model's own numbers, ``order`` of the batch's, if the model reads them."""
    if not task.reads_labels(model):
        return batch
    labels = batch["labels"]
    own = torch.tensor(list(order), device=labels.device)[labels.clamp_min(0)]
    return {**batch, "labels": torch.where(labels < 0, labels, own)}


def _on_cpu(tensor: Any) -> Any:
    return tensor.detach().float().cpu() if tensor.is_floating_point() else tensor.detach().cpu()
