"""The strength of a conservation, and the path between source and fine-tuned weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from conservtl.report.figures.canvas import DOMAIN_LOOKS, INK, TARGET, Picture, bare, draw, legend_above
from conservtl.report.figures.marks import CUT_OFF
from conservtl.report.figures.plane import PlanePoint, paint_plane
from conservtl.report.text.intervals import MeanInterval, metric_span
from conservtl.report.text.metrics import Metric, headline

__all__ = ["StrengthStep", "best_step", "path_of", "strength_curve", "strengths_of", "swept_method"]

_WIDE = 30.0  # ratio of the largest to the least strength beyond which the axis is logarithmic
_PATH = "#8A6000"


@dataclass(frozen=True)
class StrengthStep:
    """Results at one strength or at one point of the path, in the shown unit."""

    at: float
    target: MeanInterval
    source: MeanInterval | None
    metric: Metric

    @property
    def score(self) -> float:
        """The score for both domains; the target's metric if the source has no data."""
        return self.target.mean if self.source is None else self.metric.combined(self.target.mean, self.source.mean)


def strengths_of(result: Mapping[str, Any]) -> list[StrengthStep]:
    """Return the strengths in ascending order."""
    return _steps(result.get("strengths") or [], "strength", headline(result))


def path_of(result: Mapping[str, Any]) -> list[StrengthStep]:
    """Return the points of the path, from the source on."""
    return _steps(result.get("path") or [], "t", headline(result))


def best_step(steps: Sequence[StrengthStep]) -> StrengthStep | None:
    """Return the step with the best score."""
    return max(steps, key=lambda step: step.metric.rank(step.score), default=None)


def strength_curve(result: Mapping[str, Any]) -> Picture | None:
    """Draw the metric against strength, and strength and path in the plane; None if there are neither."""
    strengths, path = strengths_of(result), path_of(result)
    if not strengths and not path:
        return None
    plane = all(step.source is not None for step in (*strengths, *path))
    method, metric = swept_method(result), headline(result)
    left = [(strengths, f"strength of {method}", True)] if strengths else []
    if not plane and path:
        left.append((path, "t (0: the source, 1: fine-tuned)", False))

    def paint(figure: Any) -> None:
        panels = list(figure.subplots(1, len(left) + plane, squeeze=False)[0])
        for axes, (steps, name, scaled) in zip(panels, left, strict=False):
            _against(axes, steps, name, metric, scaled=scaled)
        if plane:
            _plane(figure, panels[-1], strengths, path, method, metric)

    svg = draw("strength", f"Target and source {metric.name} against the strength of {method}.", 3.9, paint)
    return Picture("How strong", _caption(strengths, path, metric, plane=plane), svg)


def _caption(strengths: Sequence[StrengthStep], path: Sequence[StrengthStep], metric: Metric, *, plane: bool) -> str:
    walk = "the path (1 − t) × source + t × fine-tuned weights, which needs no further training"
    shown = [f"{metric.name} against strength"] if strengths else []
    if plane:
        both = " and ".join([*(["the strengths"] if strengths else []), *([walk] if path else [])])
        shown.append(f"target against source: {both}, with lines of equal {metric.with_unit(metric.combination)}")
    elif path:
        shown.append(walk)
    places = ("Left", "Right") if len(shown) == 2 else ("Shown",)
    parts = [f"{place}: {text}." for place, text in zip(places, shown, strict=True)]
    certain = any(step.target.certain for step in (*strengths, *path))
    parts.append(f"Bands and bars: 95 % intervals of the mean. {CUT_OFF}" if certain else "One run each: no intervals.")
    return " ".join(parts)


def swept_method(result: Mapping[str, Any]) -> str:
    """Return the name of the method whose strength is swept."""
    return str(next((each.get("method") for each in result.get("strengths") or []), "the conservation"))


def _steps(points: Sequence[Mapping[str, Any]], key: str, metric: Metric) -> list[StrengthStep]:
    steps = [
        StrengthStep(float(point[key]), target, metric_span(point.get("source"), metric), metric)
        for point in points
        if (target := metric_span(point.get("target"), metric)) is not None
    ]
    return sorted(steps, key=lambda step: step.at)


def _against(axes: Any, steps: Sequence[StrengthStep], name: str, metric: Metric, *, scaled: bool) -> None:
    """Draw both domains against strength or t, with a legend."""
    positive = [step.at for step in steps if step.at > 0]
    log = scaled and bool(positive) and max(positive) / min(positive) > _WIDE
    # A logarithmic axis has no 0: strength 0 is drawn a factor of ten left of the least positive one.
    places = [step.at if step.at > 0 or not log else min(positive) / 10 for step in steps]
    for domain, (colour, marker, stroke) in DOMAIN_LOOKS.items():
        spans = [step.target if domain == "target" else step.source for step in steps]
        measured = [(place, span) for place, span in zip(places, spans, strict=True) if span is not None]
        if not measured:
            continue
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, [y.mean for y in ys], stroke, color=colour, marker=marker, label=domain, clip_on=False)
        axes.fill_between(xs, [y.low for y in ys], [y.high for y in ys], color=colour, alpha=0.15, linewidth=0)
    if log:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{step.at:g}" for step in steps])
        if len(steps) > 7:
            axes.tick_params(axis="x", rotation=90)
    axes.minorticks_off()
    axes.set_xlabel(f"{name} (log scale)" if log else name)
    axes.set_ylabel(metric.label)
    legend_above(axes, 2, handletextpad=0.4)
    bare(axes, grid="y")


def _plane(
    figure: Any,
    axes: Any,
    strengths: Sequence[StrengthStep],
    path: Sequence[StrengthStep],
    method: str,
    metric: Metric,
) -> None:
    """Draw strengths and path as two lines of the target-source plane."""
    best, middle = best_step(strengths), best_step(path)
    lines = []
    if strengths:
        named = {strengths[0]: f"{strengths[0].at:g}", strengths[-1]: f"{strengths[-1].at:g}"}
        if best is not None:
            named[best] = f"{best.at:g}"
        marks = [_mark(step, named.get(step, ""), TARGET, "o", strong=step == best) for step in strengths]
        lines.append((marks, TARGET, "-"))
    if path:
        named = {path[0]: "t = 0, the source", path[-1]: "t = 1, fine-tuned"}
        if middle is not None and middle not in named:
            named[middle] = f"t = {middle.at:g}"
        marks = [_mark(step, named.get(step, ""), _PATH, "s", strong=False) for step in path]
        lines.append((marks, _PATH, "--"))
    names = [f"strength of {method}"] * bool(strengths) + ["path"] * bool(path)
    for (_, colour, stroke), name in zip(lines, names, strict=True):
        axes.plot([], [], stroke, color=colour, label=name)
    legend_above(axes, 2, handletextpad=0.4)
    paint_plane(figure, axes, [], lines, metric)


def _mark(step: StrengthStep, name: str, colour: str, shape: str, *, strong: bool) -> PlanePoint:
    source = cast("MeanInterval", step.source)  # the plane is drawn only if every step has one
    return PlanePoint(name, source, step.target, colour, colour if name else INK, shape, strong=strong)
