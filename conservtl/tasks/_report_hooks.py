"""Results that a task may report beside its metrics; most tasks report none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conservtl.functions import MetricValue

__all__ = ["ReportHooks"]


class ReportHooks:
    """Methods of a task for reports, each with a default that adds nothing."""

    def agreement(self, outputs: Any, source: Any) -> Mapping[str, MetricValue]:  # noqa: ARG002
        """Return how far outputs agree with the source model's on the same batch; empty: not measured.

        Args:
            outputs: of the adapted model, on the CPU.
            source: of the source model, on the CPU.
        """
        return {}

    def per_class(
        self,
        before: Sequence[Any],  # noqa: ARG002
        after: Sequence[Any],  # noqa: ARG002
        labels: Sequence[Any],  # noqa: ARG002
        names: Sequence[str],  # noqa: ARG002
    ) -> dict[str, Any] | None:
        """Return the headline metric of each class before and after; None where the task has no classes.

        Args:
            before: outputs of the source model, a batch each.
            after: outputs of the adapted model, a batch each.
            labels: what ``labels`` gives for each batch.
            names: the classes.
        """
        return None

    def errors(
        self,
        outputs: Sequence[Any],  # noqa: ARG002
        labels: Sequence[Any],  # noqa: ARG002
        records: Sequence[Any],  # noqa: ARG002
    ) -> list[float] | None:
        """Return how wrong the answer to each example of a set is; None: examples are not judged one by one.

        Args:
            outputs: a batch each.
            labels: what ``labels`` gives for each batch.
            records: what ``record`` gives for each batch.
        """
        return None

    def record(self, outputs: Any, batch: Any) -> Any:  # noqa: ARG002
        """Return what ``details`` needs of a batch and its outputs."""
        return None

    def details(self, before: Mapping[str, Any], after: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return what a report says beside the metrics, as JSON; empty: nothing.

        Args:
            before: "target", "source" -> scores of the source model, with the ``records`` of all batches.
            after: the same of the adapted model.
            data: the test parts.

        Returns:
            ``tables``: {title, note, header, rows, text_columns} each; ``examples``: {name, lines: [[what, text], ...],
            audio: a data URI or empty} each.
        """
        return {}
