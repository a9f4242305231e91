"""Sweep: over the number of transferred layers, and over the strength of a conservation method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conservtl.errors import SpecError, counted
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.sections import SweepSection
from conservtl.experiments.spec.spec import Spec, with_fields
from conservtl.experiments.studies.bootstrap import interval
from conservtl.experiments.studies.executors.names import PROCESSES, check_executor
from conservtl.experiments.studies.result_store import ResultStore, estimate
from conservtl.experiments.studies.run_results import distinct, over_all, taken_over
from conservtl.experiments.studies.trial import How, Trial, on_target
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan

__all__ = ["plan_trials", "summarise", "sweep", "transferable_layers"]

_STRENGTHS = ("alpha", "rho", "weight", "eta")
_DECADES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_RHOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


_FORMS: dict[str, tuple[How, bool]] = {
    "AnB": ("adapt", True),
    "AnB+": ("adapt", False),
    "BnB": ("control", True),
    "BnB+": ("control", False),
}
"""Ways to transfer layers, by Yosinski's names: from the source (A) or the target itself (B), frozen or not."""


@dataclass(frozen=True)
class TransferableLayers:
    """Layers that can be transferred, in order, and whether the head is one of them."""

    names: tuple[str, ...]
    head: bool

    def from_side(self, side: str, number: int) -> int | tuple[str, ...]:
        """Return ``number`` layers from a side as ``LayerTransfer`` takes them.

        It counts from the model's last layer, so layers below a head that stays behind are given by their names.
        """
        below = side == "output" and not self.head and number > 0
        return self.names[-number:] if below else number


@dataclass(frozen=True)
class LayerPoint:
    """A point of a curve over layers: so many layers from a side, transferred in one form."""

    side: str
    form: str
    number: int


@dataclass(frozen=True)
class StrengthPoint:
    """A point of the curve over the strength of a method."""

    method: str
    strength: float


Point = LayerPoint | StrengthPoint | Literal["path"]
"""A point of a curve; "path": plain fine-tuning, evaluated along the path from the source to its weights."""


def sweep(
    spec: Spec,
    out: str | Path,
    *,
    processes: int = 1,
    executor: str | Executor = PROCESSES,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure both domains over the number of transferred layers, and over the strength of a conservation method.

    Layers: for n = 0, 1, ... from either side, n layers of the source are transferred and the others are initialised:
    frozen (AnB) or fine-tuned (AnB+); as controls the same from a network trained on the target's shots (BnB, BnB+).
    Strength: over decades, with the path between source and plain fine-tuning, which needs no further training.
    Arguments are as for ``comparison.compare``.

    Returns:
        The content of ``sweep.json``; with ``dry_run`` the estimate.

    Reference:
        Yosinski, Clune, Bengio and Lipson 2014, "How transferable are features in deep neural networks?", section 3.
    """
    check_executor(executor, processes)
    layers = transferable_layers(spec)
    trials = plan_trials(spec, layers)
    if dry_run:
        return estimate([trial for trial, _ in trials], processes)
    runs = ResultStore(Path(out), say).results([trial for trial, _ in trials], processes, executor)
    return summarise(spec, layers, [point for _, point in trials], runs)


def summarise(
    spec: Spec, layers: TransferableLayers, points: Sequence[Point], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of ``sweep.json``: curves over layers and strengths, with 95 % intervals.

    There is a run for each point.
    """
    by_point: dict[Point, list[Mapping[str, Any]]] = defaultdict(list)
    for point, run in zip(points, runs, strict=True):
        by_point[point].append(run)
    return {
        "kind": "sweep",
        "metric": spec.problem.headline.as_json(),
        "layers": list(layers.names),
        "curves": _curves(by_point),
        "strengths": [
            {"method": point.method, "strength": point.strength, **_figures(found)}
            for point, found in by_point.items()
            if isinstance(point, StrengthPoint)
        ],
        "path": _path(distinct(by_point.get("path", [])), spec.problem.headline.metric),
        "before": _figures(runs, "before"),
        "shots": spec.model_dump(mode="json")["data"]["shots"],
        "taken": taken_over(runs),
        "classes": spec.problem.has_classes,
        **over_all(runs),
        "spec": spec.model_dump(mode="json"),
    }


def plan_trials(spec: Spec, layers: TransferableLayers) -> list[tuple[Trial, Point]]:
    """Return every run with the point of a curve that it belongs to, those that share data and source model together.

    Raises:
        SpecError: the section asks for more layers than there are, or for a strategy without a strength.
    """
    section = spec.sweep or SweepSection()
    count = len(layers.names)
    numbers = section.layers if section.layers is not None else tuple(range(count))
    if beyond := [n for n in numbers if n > count]:
        raise SpecError(f"sweep.layers: {beyond[0]} is more than the model has ({count}). Ask for fewer.")
    method, field, strengths = _strengths(spec, section)
    forms = [form for form, (how, _) in _FORMS.items() if section.controls or how != "control"]
    trials: list[tuple[Trial, Point]] = []
    for target in section.targets or spec.problem.targets(spec.data):
        for seed in range(spec.seed, spec.seed + section.seeds):
            plain = with_fields(on_target(spec, target), {"seed": seed, "strategies": []})
            for side in section.sides:
                trials += [
                    (_transferring(plain, target, side, layers.from_side(side, n), form), LayerPoint(side, form, n))
                    for n in numbers
                    for form in forms
                ]
            for strength in strengths:
                conserving = with_fields(plain, {"strategies": [{**method, field: strength}]})
                name = f"{method['kind']}, {field} {strength:g}"
                trials.append((Trial(name, target, conserving), StrengthPoint(method["kind"], strength)))
            trials.append((Trial("fine-tuning", target, plain, path=True), "path"))
    return trials


def _transferring(spec: Spec, target: str, side: str, layers: int | tuple[str, ...], form: str) -> Trial:
    number = layers if isinstance(layers, int) else len(layers)
    name = f"{form} from the {side} side, {counted(number, 'layer')}"
    if number == 0:
        return Trial(name, target, spec, "scratch")
    how, freeze = _FORMS[form]
    strategy = {"kind": "layer_transfer", "side": side, "layers": layers, "rest": "fresh", "freeze": freeze}
    return Trial(name, target, with_fields(spec, {"strategies": [strategy]}), how)


def transferable_layers(spec: Spec) -> TransferableLayers:
    """Return the layers that can be transferred: all if the labels are shared, else all but the head."""
    setting = prepare(on_target(spec, ((spec.sweep or SweepSection()).targets or spec.problem.targets(spec.data))[0]))
    model = setting.model(len(setting.domains.labels))
    layers = Plan.draw(find_layers(model, setting.example, spec.layers), {}, {}).layers
    return TransferableLayers(layers if setting.shared else layers[:-1], head=setting.shared)


def _strengths(spec: Spec, section: SweepSection) -> tuple[dict[str, Any], str, tuple[float, ...]]:
    """Return the method whose strength is swept, the field that holds it, and its values."""
    given = [section.strategy] if section.strategy else [one.model_dump(mode="json") for one in spec.strategies]
    for fields in given:
        field = next((name for name in _STRENGTHS if name in fields), None)
        if field is not None:
            strength = fields[field]
            around = tuple(strength * decade for decade in _DECADES) if strength else _DECADES
            around = _within_reach(around, spec, fields.get("mode"))
            values = (_RHOS if field == "rho" else around) if section.strengths is None else section.strengths
            return {key: value for key, value in fields.items() if value is not None}, field, values
    if section.strategy:
        raise SpecError(
            f"sweep.strategy: needs one of the fields {', '.join(_STRENGTHS)}; received {section.strategy}. Write the "
            "strength out."
        )
    around = _within_reach(tuple(10 * decade for decade in _DECADES), spec, "decoupled")
    return {"kind": "l2_sp", "mode": "decoupled"}, "alpha", around if section.strengths is None else section.strengths


def _within_reach(strengths: tuple[float, ...], spec: Spec, mode: Any) -> tuple[float, ...]:
    """Return the strengths at which a decoupled pull does not overshoot the source: rate times strength is 1 at most.

    The highest of them stands in the place of all that are left out.
    """
    highest = 1 / spec.training.lr
    if mode != "decoupled" or max(strengths) <= highest:
        return strengths
    return (*(strength for strength in strengths if strength < highest), highest)


def _curves(by_point: Mapping[Point, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one curve for each side and form, its points by the number of layers."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for point, runs in by_point.items():
        if isinstance(point, LayerPoint):
            curves[point.side, point.form].append({"n": point.number, **_figures(runs)})
    return [
        {"side": side, "form": form, "points": sorted(points, key=lambda point: point["n"])}
        for (side, form), points in curves.items()
    ]


def _figures(runs: Sequence[Mapping[str, Any]], when: str = "after") -> dict[str, Any]:
    return {
        name: interval([run[when][name] for run in distinct(runs) if run[when][name] is not None])
        for name in ("target", "source")
    }


def _path(runs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return the mean over runs of plain fine-tuning at each point between the source's and the trained weights."""
    points: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for entry in run["path"]:
            for name in ("target", "source"):
                if name in entry:
                    points[entry["t"]][name].append(entry[name][metric])
    return [
        {"t": t, **{name: interval(values) for name, values in found.items()}} for t, found in sorted(points.items())
    ]
