"""The tables of a run's page, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.plan.plan import Plan
from conservtl.plan.table import HEADER, beside, lines, named, rows_by_label
from conservtl.report.text.metrics import Verdict, metrics_of, number, pair, signed
from conservtl.report.text.summary import read_plan

__all__ = ["LayerRow", "MetricRow", "PlanTable", "agreement_rows", "metric_rows", "plan_table"]


@dataclass(frozen=True)
class MetricRow:
    """One metric of one domain."""

    domain: str
    name: str
    before: str
    after: str
    change: str
    verdict: Verdict
    main: bool


@dataclass(frozen=True)
class LayerRow:
    """One layer of the plan."""

    cells: tuple[str, ...]
    frozen: bool
    fresh: bool
    reason: str


@dataclass(frozen=True)
class PlanTable:
    """The plan by layer, with its totals, phases and decisions beside the layers."""

    header: tuple[str, ...]
    rows: list[LayerRow]
    totals: list[tuple[str, str]]
    phases: list[tuple[str, str, str, str]]
    ratios: bool
    beside: list[tuple[str, str]]


def metric_rows(report: Mapping[str, Any]) -> list[MetricRow]:
    """Return every metric of target and source, the most important one first in each."""
    rows = []
    for domain in ("target", "source"):
        for place, metric in enumerate(metrics_of(report, domain)):
            values = pair(report, domain, metric.key)
            rows.append(
                MetricRow(
                    domain=domain,
                    name=metric.name,
                    before=metric.show(values.before),
                    after=metric.show(values.after),
                    change=metric.change(values),
                    verdict=metric.verdict(values),
                    main=place == 0,
                )
            )
    return rows


def agreement_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return how far the model agrees with the source model: name, before, after, difference."""
    sides = report.get("agreement") or {}
    rows = []
    for key, name in (
        ("agreement", "same answer as the source model"),
        ("kl", "KL divergence from it (nats)"),
    ):
        before, after = (number((sides.get(side) or {}).get(key)) for side in ("before", "after"))
        if before is None and after is None:
            continue
        share = key == "agreement"
        shown = [("–" if v is None else f"{100 * v:.1f} %" if share else f"{v:.3f}") for v in (before, after)]
        change = ""
        if before is not None and after is not None:
            change = f"{signed(100 * (after - before))} points" if share else signed(after - before, 3)
        rows.append((name, *shown, change))
    return rows


def plan_table(report: Mapping[str, Any]) -> PlanTable | None:
    """Return the table that a plan prints, by layer; None if the report has no plan."""
    plan = read_plan(report)
    if plan is None:
        return None
    reasons = {layer: "; ".join(dict.fromkeys(r.reason for r in rows if r.reason)) for layer, rows in plan.by_layer()}
    reasons |= {layer: f"rows copied by label, {said}" for layer, said in rows_by_label(plan).items()}
    rows = [
        LayerRow(cells, cells[3].startswith("frozen"), cells[2] != "source", reasons[layer])
        for (layer, _), cells in zip(plan.by_layer(), lines(plan), strict=True)
    ]
    total = plan.totals()
    whole = max(1, total["all"])
    totals = [
        (name, f"{total[name]:,} ({100 * total[name] / whole:.1f} %)")
        for name in ("trained", "frozen", "copied", "fresh")
    ]
    ratios = any("×" in row.cells[4] for row in rows)
    return PlanTable(HEADER, rows, [("all", f"{total['all']:,}"), *totals], _phases(plan), ratios, beside(plan))


def _phases(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return name, length, scale on the rates and trained layers of each phase; empty if there is only one."""
    if len(plan.phases) < 2:
        return []
    rows = []
    for place, phase in enumerate(plan.phases):
        frozen = plan.frozen_in(place)
        names = list(dict.fromkeys(row.layer for row in plan.rows if row.name not in frozen))
        rows.append((phase.name, phase.lasts, f"× {phase.scale:g}", named(names, 4)))
    return rows
