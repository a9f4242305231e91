"""Base of tasks that give each input one class."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.data.shots import Shots
from conservtl.functions import MetricValue, accuracy, cross_entropy, labels_of, logits_of
from conservtl.tasks.base import DataSection, Prediction, Task

__all__ = ["ClassData", "Classification"]


class ClassData(DataSection):
    """Base of a ``data`` section whose shots are counted a class; ``conservtl.data.draw_shots`` draws them."""

    shots: Shots = 5  # type: ignore[assignment]  # wider than that of a task that counts its shots itself
    """Labelled target examples of each class to adapt with: a number, ``{up_to: 5}`` or ``all``."""


class Classification(Task, ABC):
    """One class an input: cross-entropy, accuracy, accuracy by class, agreement with the source model."""

    has_classes: ClassVar[bool] = True

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(outputs, batch)

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, MetricValue]:
        """Return the accuracy."""
        return accuracy(outputs, batch)

    def labels(self, batch: Any) -> Tensor:
        """Return the class of each example, (N,)."""
        return labels_of(batch)

    def agreement(self, outputs: Any, source: Any) -> dict[str, float]:
        """Return how far the answers agree with the source model's.

        Args:
            outputs: (N, classes) logits of the adapted model.
            source: (N, classes) logits of the source model, on the same examples.

        Returns:
            ``agreement``: share of examples with the same largest logit; ``kl``: mean KL(source || adapted) in nats.
        """
        adapted, source = logits_of(outputs), logits_of(source)
        kl = F.kl_div(adapted.log_softmax(-1), source.log_softmax(-1), reduction="batchmean", log_target=True)
        same = (adapted.argmax(-1) == source.argmax(-1)).float().mean()
        return {"agreement": float(same), "kl": max(0.0, float(kl))}

    def per_class(
        self, before: Sequence[Any], after: Sequence[Any], labels: Sequence[Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return the accuracy of each class before and after; None for a class without examples."""
        truth = torch.cat([*labels])
        answers = {
            when: torch.cat([logits_of(batch).argmax(-1) for batch in outputs])
            for when, outputs in (("before", before), ("after", after))
        }
        table: dict[str, Any] = {"labels": list(names), "before": [], "after": [], "counts": []}
        for label in range(len(names)):
            of_class = truth == label
            count = int(of_class.sum())
            table["counts"].append(count)
            for when, answer in answers.items():
                right = int((answer[of_class] == label).sum())
                table[when].append(right / count if count else None)
        return table

    def errors(self, outputs: Sequence[Any], labels: Sequence[Any], records: Sequence[Any]) -> list[float]:  # noqa: ARG002
        """Return 0 for each right answer and 1 for each wrong one."""
        answers = torch.cat([logits_of(batch).argmax(-1) for batch in outputs])
        return (answers != torch.cat([*labels])).float().tolist()

    def predictions(self, outputs: Any, labels: tuple[str, ...], files: Sequence[Path]) -> list[Prediction]:
        """Return the most probable class of each file."""
        probabilities, answers = logits_of(outputs).softmax(-1).max(-1)
        return [
            Prediction(file, labels[answer], probability)
            for file, answer, probability in zip(files, answers.tolist(), probabilities.tolist(), strict=True)
        ]
