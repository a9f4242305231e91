"""The small table of an adaptation: metrics of each set before and after, and the agreement with the source model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conservtl.report.text.metrics import Metric, pair

__all__ = ["GAINS", "gain_rows"]

GAINS = ("", "before", "after", "change")
"""Header of the table."""


def gain_rows(
    report: Mapping[str, Any], metrics: Mapping[str, Iterable[Metric]], unknown: str | None = None
) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table.

    Args:
        report: ``before`` and ``after``, and ``agreement`` or None.
        metrics: set -> its metrics, in the order of the rows.
        unknown: shown in the place of a value before that was not measured; None: such rows are left out.
    """
    rows = []
    for name, metric in ((name, metric) for name, each in metrics.items() for metric in each):
        values = pair(report, name, metric.key)
        if values.after is None or (values.before is None and unknown is None):
            continue
        before, change = str(unknown), ""
        if values.before is not None:
            before = metric.show(values.before)
            change = f"{metric.scaled(values.after) - metric.scaled(values.before):+.{metric.digits}f}"
        rows.append((f"{name} {metric.name}", before, metric.show(values.after), change))
    after = (report["agreement"] or {}).get("after", {})
    if "agreement" in after:
        rows.append(("answers as the source, on the target", "", f"{100 * after['agreement']:.1f} %", ""))
    if "kl" in after:
        rows.append(("KL divergence from it", "", f"{after['kl']:.3f}", "nats"))
    return rows
