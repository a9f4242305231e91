"""The tables of the page, as plain rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.plan.plan import Plan
from conservtl.plan.table import HEADER, beside, lines
from conservtl.report.text.metrics import Verdict, measured, number, pair, signless
from conservtl.report.text.summary import read_plan

__all__ = ["Number", "PlanTable", "agreement", "before_after", "plan_table"]


@dataclass(frozen=True)
class Number:
    """One row of the table of results."""

    domain: str
    name: str
    before: str
    after: str
    change: str
    verdict: Verdict
    main: bool


@dataclass(frozen=True)
class Line:
    """One layer of the plan."""

    cells: tuple[str, ...]
    frozen: bool
    fresh: bool
    reason: str


@dataclass(frozen=True)
class PlanTable:
    """The plan by layer, with its totals and phases, and what is decided beside the layers."""

    header: tuple[str, ...]
    lines: list[Line]
    totals: list[tuple[str, str]]
    phases: list[tuple[str, str, str, str]]
    ratios: bool
    beside: list[tuple[str, str]]


def before_after(report: Mapping[str, Any]) -> list[Number]:
    """Every metric of target and source, the one that matters most first in each."""
    rows = []
    for domain in ("target", "source"):
        for place, metric in enumerate(measured(report, domain)):
            values = pair(report, domain, metric.key)
            rows.append(
                Number(
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


def agreement(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """How much of the source model's behaviour is left: name, before, after, difference."""
    given = report.get("agreement") or {}
    rows = []
    for key, name in (
        ("agreement", "same answer as the source model"),
        ("kl", "KL divergence from it (nats)"),
    ):
        before, after = (number((given.get(side) or {}).get(key)) for side in ("before", "after"))
        if before is None and after is None:
            continue
        share = key == "agreement"
        shown = [("–" if v is None else f"{100 * v:.1f} %" if share else f"{v:.3f}") for v in (before, after)]
        change = ""
        if before is not None and after is not None:
            change = f"{100 * (after - before):+.1f} points" if share else f"{after - before:+.3f}"
        rows.append((name, *shown, signless(change)))
    return rows


def plan_table(report: Mapping[str, Any]) -> PlanTable | None:
    """The table a plan prints, by layer; None where the report holds no plan."""
    plan = read_plan(report)
    if plan is None:
        return None
    reasons = {layer: "; ".join(dict.fromkeys(r.reason for r in rows if r.reason)) for layer, rows in plan.by_layer()}
    rows = [
        Line(cells, cells[3] == "frozen", cells[2] != "source", reasons[layer])
        for (layer, _), cells in zip(plan.by_layer(), lines(plan), strict=True)
    ]
    total = plan.totals()
    whole = max(1, total["all"])
    totals = [
        (name, f"{total[name]:,} ({100 * total[name] / whole:.1f} %)")
        for name in ("trained", "frozen", "copied", "fresh")
    ]
    ratios = any("×" in line.cells[4] for line in rows)
    return PlanTable(HEADER, rows, [("all", f"{total['all']:,}"), *totals], _phases(plan), ratios, beside(plan))


def _phases(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Name, length, scale on the rates and trained layers of each phase, where there is more than one."""
    if len(plan.phases) < 2:
        return []
    out = []
    for place, phase in enumerate(plan.phases):
        frozen = plan.frozen_in(place)
        names = list(dict.fromkeys(row.layer for row in plan.rows if row.name not in frozen))
        trains = ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]} ({len(names)} layers)"
        out.append((phase.name, phase.lasts, f"× {phase.scale:g}", trains))
    return out
