"""A run in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.errors import counted, joined
from conservtl.plan.plan import Plan
from conservtl.report.text.chance import Turned, turned
from conservtl.report.text.examples import target_text
from conservtl.report.text.metrics import Verdict, headline, number, pair

__all__ = [
    "NO_LABELS",
    "NO_SOURCE_HEAD",
    "costly",
    "duration",
    "left_out_notes",
    "read_plan",
    "rows_notes",
    "sentence",
    "study_notes",
    "verdict",
]


_NAMED = 4  # variants that a note names
NO_LABELS = "the source's weights have no head, so the source has no labels of its own"
"""Why nothing is known about a source's answers."""

NO_SOURCE_HEAD = (
    f"source metrics, and agreement and KL divergence with the source model, because {NO_LABELS}; the drift of each "
    "layer says how far its weights moved from the source's"
)
"""Metrics that a run leaves out if its source has no head, and why."""


def sentence(report: Mapping[str, Any]) -> str:
    """Return a sentence about the target's gain, the source's loss and the cost of a run.

    Example:
        >>> print(sentence({
        ...     "target": "jackson", "shots": 5, "example": "recording", "classes": True, "seconds": {"adapt": 14.2},
        ...     "before": {"target": {"accuracy": 0.724}, "source": {"accuracy": 0.994}},
        ...     "after": {"target": {"accuracy": 0.976}, "source": {"accuracy": 0.989}},
        ... }))
        Adapted to jackson from 5 recordings a class: target accuracy 72.4 % → 97.6 % (+25.2 points); \
source kept 98.9 % of 99.4 % (−0.5 points). Trained in 14 s.
    """
    parts = [f"{_target(report)}; {_source(report)}."]
    if costly(report):
        parts.append("The source lost more than the target gained.")
    if cost := _cost(report):
        parts.append(cost)
    return " ".join(parts)


def verdict(report: Mapping[str, Any]) -> Verdict:
    """Return whether the target got better; a change within chance is none."""
    metric = headline(report)
    found = metric.verdict(pair(report, "target", metric.key))
    return "same" if found in ("better", "worse") and _by_chance(report, "target") else found


def costly(report: Mapping[str, Any]) -> bool:
    """Return whether the target gained and the source lost more than that."""
    metric = headline(report)
    gain = metric.gain(pair(report, "target", metric.key))
    kept = metric.gain(pair(report, "source", metric.key))
    if gain is None or kept is None or verdict(report) != "better":
        return False
    return round(gain + kept, 3) < 0


def left_out_notes(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on each thing that a run or a study could not measure."""
    return [f"Not measured: {text}." for text in result.get("left_out") or ()]


def rows_notes(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on rows of a head that a run, or some runs of a study, copied by label."""
    return [f"Rows copied by label, {said}." for said in result.get("rows_by_label") or ()]


def study_notes(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on all runs of a study: seeds that changed nothing, and rows of a head copied by label."""
    notes = rows_notes(result)
    if names := result.get("repeated"):
        more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        notes.append(
            f"The seeds changed nothing for {joined([*names[:_NAMED], *more])}: runs that differ in the seed alone end "
            "in the same weights, so they count as one run. Draw the shots by the seed (data.shots, in Python shots=), "
            "use batches smaller than the data, or let fresh layers begin at random values."
        )
    return notes


def duration(seconds: float) -> str:
    """Return seconds in the units a person would use."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def read_plan(report: Mapping[str, Any]) -> Plan | None:
    """Return the plan of a report; None if it has none."""
    plan = report.get("plan")
    return Plan.model_validate(plan) if plan else None


def _target(report: Mapping[str, Any]) -> str:
    metric, target = headline(report), target_text(report)
    values = pair(report, "target", metric.key)
    if not values.measured:
        return f"Adapted to {target}: target not measured"
    if values.before is None or values.after is None:
        when = "before (not measured after)" if values.after is None else "after (not measured before)"
        value = metric.show(values.before if values.after is None else values.after)
        return f"Adapted to {target}: target {metric.name} {value} {when}"
    numbers = f"{metric.show(values.before)} → {metric.show(values.after)} ({metric.change(values)}"
    if (chance := _by_chance(report, "target")) and metric.verdict(values) != "same":
        said = chance.text(str(report.get("example") or "example"))
        return f"Adapted to {target}: target {metric.name} {numbers}, within chance: {said})"
    numbers += ")"
    match metric.verdict(values):
        case "worse":
            return f"Adapting to {target} made the target worse: {metric.name} {numbers}"
        case "same":
            return f"Adapting to {target} did not improve the target: {metric.name} {numbers}"
        case _:
            return f"Adapted to {target}: target {metric.name} {numbers}"


def _source(report: Mapping[str, Any]) -> str:
    metric = headline(report)
    source = pair(report, "source", metric.key)
    if source.after is None and NO_SOURCE_HEAD in (report.get("left_out") or ()):
        return _drift(report)
    if source.after is None:
        return _agreement(report)
    if source.before is None:
        return f"source {metric.name} {metric.show(source.after)} after (not measured before)"
    chance = ", within chance" if _by_chance(report, "source") and metric.verdict(source) != "same" else ""
    numbers = f"({metric.change(source)}{chance})"
    if metric.better == "higher" and metric.verdict(source) != "better":
        return f"source kept {metric.show(source.after)} of {metric.show(source.before)} {numbers}"
    return f"source {metric.name} {metric.show(source.before)} → {metric.show(source.after)} {numbers}"


def _by_chance(report: Mapping[str, Any], domain: str) -> Turned | None:
    """Return the answers that changed on a domain if their difference is within chance."""
    found = turned(report, domain)
    return found if found is not None and found.within_chance else None


def _agreement(report: Mapping[str, Any]) -> str:
    sides = report.get("agreement") or {}
    before, after = (sides.get("before") or {}), (sides.get("after") or {})
    share, kl = number(after.get("agreement")), number(after.get("kl"))
    if share is None:
        return "source not measured"
    start = number(before.get("agreement"))
    shares = f"{100 * share:.1f} %" if start is None else f"{100 * start:.1f} % → {100 * share:.1f} %"
    divergence = "" if kl is None else f" (KL {kl:.2f})"
    held = "with nothing of the source held out" if (report.get("examples") or {}).get("source_train") else ""
    return f"{held or 'without source data'}, agreement with the source model {shares}{divergence}"


def _drift(report: Mapping[str, Any]) -> str:
    """Return how far the layers from the source moved, in the place of scores of a source without labels."""
    values = ((name, number(value)) for name, value in (report.get("drift") or {}).items())
    drift = {name: value for name, value in values if value is not None}
    said = "the source has no labels of its own to measure"
    if not drift:
        return said
    far = max(drift, key=lambda name: drift[name])
    return f"{said}, and its weights moved by at most {100 * drift[far]:.2g} % of their norm (layer {far})"


def _cost(report: Mapping[str, Any]) -> str:
    seconds = number((report.get("seconds") or {}).get("adapt"))
    time = "" if seconds is None else f" in {duration(seconds)}"
    plan = read_plan(report)
    if plan is None:
        return f"Trained{time}." if time else ""
    totals = plan.totals()
    share = totals["trained"] / max(1, totals["all"])
    if totals["trained"] == totals["all"]:
        return f"All {_parameters(totals['all'])} trained{time}."
    return f"{_percent(share)} of {_parameters(totals['all'])} trained{time}."


def _percent(share: float) -> str:
    if share == 0:
        return "None"
    # Never rounded to 0 or 100: some parameters are trained and some are not.
    return f"{100 * share:.2g} %" if share < 0.01 else f"{min(99, round(100 * share))} %"


def _parameters(count: int) -> str:
    if count < 1_000_000:
        return counted(count, "parameter")
    return f"{f'{count / 1e6:.3g} million' if count < 1e9 else f'{count / 1e9:.3g} billion'} parameters"
