"""The tables of a run, and the small one of what it gained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from conservtl.errors import counted
from conservtl.plan.plan import Plan
from conservtl.plan.table import HEADER, beside, lines, named, rows_by_label
from conservtl.report.text.chance import turned
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.report.text.metrics import Metric, metrics_of, number, pair, signed
from conservtl.report.text.summary import read_plan

__all__ = ["agreement_rows", "agreement_table", "detail_tables", "gain_table", "metric_table", "plan_tables"]


def metric_table(report: Mapping[str, Any]) -> HtmlTable:
    """Return every metric of target and source, the most important one first in each."""
    rows = []
    for domain in ("target", "source"):
        for place, metric in enumerate(metrics_of(report, domain)):
            values, verdict = pair(report, domain, metric.key), metric.verdict(pair(report, domain, metric.key))
            kind: Literal["", "better", "worse"] = verdict if verdict in ("better", "worse") else ""
            said: str = "" if verdict == "unknown" else verdict
            if kind and not place and (changed := turned(report, domain)) and changed.within_chance:
                kind, said = "", "within chance"
            cells = [
                Cell("" if place else domain),
                Cell(metric.name),
                Cell(metric.show(values.before)),
                Cell(metric.show(values.after), kind="" if place else "strong"),
                Cell(metric.change(values), kind=kind),
                Cell(said, kind=kind),
            ]
            rows.append(TableRow(cells, "" if place else "strong"))
    header = ["", "metric", "before", "after", "difference", ""]
    return HtmlTable("", "", header, rows, frozenset({0, 1, 5}), look="numbers")


def gain_table(
    report: Mapping[str, Any], metrics: Mapping[str, Iterable[Metric]], unknown: str | None = None
) -> HtmlTable:
    """Return the small table of an adaptation: metrics before and after, and the agreement with the source model.

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
    return HtmlTable("", "", ["", "before", "after", "change"], _plain(rows))


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


def agreement_table(report: Mapping[str, Any]) -> HtmlTable:
    """Return how far the model agrees with the source model."""
    note = (
        "Outputs compared with those of the source model, on the target’s test data, without labels: the table shows "
        "what changed, not whether the change is right."
    )
    title = "What is left of the source model’s behaviour"
    return HtmlTable(title, note, ["", "before", "after", "difference"], _plain(agreement_rows(report)))


def plan_tables(report: Mapping[str, Any]) -> list[HtmlTable]:
    """Return the table that a plan prints, its phases if there are several, and its decisions beside the layers."""
    plan = read_plan(report)
    if plan is None:
        return []
    reasons = {layer: "; ".join(dict.fromkeys(r.reason for r in rows if r.reason)) for layer, rows in plan.by_layer()}
    reasons |= {layer: f"rows copied by label, {said}" for layer, said in rows_by_label(plan).items()}
    rows = []
    for layer, parameters, origin, *cells in lines(plan):
        marked = Cell(origin, reasons[layer], "" if origin == "source" else "worse")
        frozen = cells[0].startswith("frozen")
        rows.append(TableRow([Cell(layer), Cell(parameters), marked, *map(Cell, cells)], "quiet" if frozen else ""))
    total = plan.totals()
    shares = ", ".join(
        f"{total[name]:,} {name} ({100 * total[name] / max(1, total['all']):.1f} %)"
        for name in ("trained", "frozen", "copied", "fresh")
    )
    note = (
        f"Input side first. {counted(total['all'], 'parameter')}: {shares}. Rates with × are ratios to the "
        "optimizer’s rate. Pull: strength toward the source weights. Decay: strength toward zero, for new parameters."
    )
    return [
        HtmlTable("What was done to each layer", note, HEADER, rows, frozenset({0, 2, 3})),
        HtmlTable("Phases", "", ["phase", "length", "rates", "trains"], _plain(_phases(plan)), frozenset({0, 3})),
        HtmlTable("Other decisions", "", ["when", "decision"], _plain(beside(plan)), frozenset({0, 1})),
    ]


def detail_tables(report: Mapping[str, Any]) -> list[HtmlTable]:
    """Return the tables that the task adds."""
    return [
        HtmlTable(one["title"], one["note"], one["header"], _plain(one["rows"]), frozenset(one["text_columns"]))
        for one in (report.get("details") or {}).get("tables") or []
    ]


def _phases(plan: Plan) -> list[tuple[str, ...]]:
    """Return name, length, scale on the rates and trained layers of each phase; empty if there is only one."""
    rows: list[tuple[str, ...]] = []
    for place, phase in enumerate(plan.phases if len(plan.phases) > 1 else ()):
        frozen = plan.frozen_in(place)
        names = list(dict.fromkeys(row.layer for row in plan.rows if row.name not in frozen))
        rows.append((f"{place + 1}  {phase.name}", phase.lasts, f"× {phase.scale:g}", named(names, 4)))
    return rows


def _plain(rows: Iterable[Iterable[Any]]) -> list[TableRow]:
    return [TableRow([Cell(str(text)) for text in row]) for row in rows]
