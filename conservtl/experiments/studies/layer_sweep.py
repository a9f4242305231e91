"""Sweep: how transferable each layer is, and how strong a conservation should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import Spec, with_fields
from conservtl.experiments.spec.study_sections import SweepSection
from conservtl.experiments.studies.bootstrap import interval
from conservtl.experiments.studies.result_store import ResultStore, estimate
from conservtl.experiments.studies.targets import on_target, targets_of
from conservtl.experiments.studies.trial import How, Trial
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan

__all__ = ["plan_trials", "sweep"]

_STRENGTHS = ("alpha", "rho", "weight", "eta")
_DECADES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_FORMS = ("AnB", "AnB+", "BnB", "BnB+")
_RHOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def sweep(
    spec: Spec,
    out: str | Path,
    *,
    processes: int = 1,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Two curves: target and source accuracy over the layers transferred, and over the strength of a conservation.

    Layers: for n = 0, 1, ... from either side, n layers of the source are transferred and the others initialised anew:
    held (AnB) or fine-tuned (AnB+); as controls the same from a network trained on the target's shots (BnB, BnB+).
    Strength: over decades, with the path between source and plain fine-tuning beside it, which costs no training.

    Args:
        spec: the spec, with a ``sweep`` section or without.
        out: folder; results are kept run by run in ``runs``, so that an interrupted sweep goes on.
        processes: runs done at the same time.
        dry_run: only count the runs and estimate their time from a measured step.
        say: told of progress.

    Returns:
        The content of ``sweep.json``; with ``dry_run`` the estimate.

    Reference:
        Yosinski, Clune, Bengio and Lipson 2014, "How transferable are features in deep neural networks?", section 3.
    """
    layers = _layers(spec)
    trials = plan_trials(spec, len(layers))
    if dry_run:
        return estimate([trial for trial, _ in trials], processes)
    runs = ResultStore(Path(out), say).results([trial for trial, _ in trials], processes)
    marks: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for (_, mark), run in zip(trials, runs, strict=True):
        marks[mark].append(run)
    return {
        "kind": "sweep",
        "metric": spec.problem.headline.as_json(),
        "layers": list(layers),
        "curves": _curves(marks),
        "strengths": [
            {"method": mark[1], "strength": mark[2], **_point(found)}
            for mark, found in marks.items()
            if mark[0] == "strength"
        ],
        "path": _path(marks.get(("path",), []), spec.problem.headline.metric),
        "before": {
            name: interval([run["before"][name] for run in runs if run["before"][name] is not None])
            for name in ("target", "source")
        },
        "runs": runs,
        "spec": spec.model_dump(mode="json"),
    }


def plan_trials(spec: Spec, layers: int) -> list[tuple[Trial, tuple[Any, ...]]]:
    """Every run with the point of a curve that it belongs to, those that share data and a source model together."""
    section = spec.sweep or SweepSection()
    numbers = section.layers if section.layers is not None else tuple(range(layers))
    if beyond := [n for n in numbers if n > layers]:
        raise SpecError(f"sweep.layers: {beyond[0]} is more than the model has ({layers}). Ask for fewer.")
    method, field, strengths = _strengths(spec, section)
    trials: list[tuple[Trial, tuple[Any, ...]]] = []
    for target in section.targets or targets_of(spec):
        for seed in range(spec.seed, spec.seed + section.seeds):
            here = with_fields(on_target(spec, target), {"seed": seed, "strategies": []})
            for side in section.sides:
                trials += [
                    (_transferring(here, target, side, n, form), ("layers", side, form, n))
                    for n in numbers
                    for form in _FORMS[: 4 if section.controls else 2]
                ]
            for strength in strengths:
                chosen = with_fields(here, {"strategies": [{**method, field: strength}]})
                name = f"{method['kind']}, {field} {strength:g}"
                trials.append((Trial(name, target, chosen), ("strength", method["kind"], strength)))
            trials.append((Trial("fine-tuning", target, here, path=True), ("path",)))
    return trials


def _transferring(spec: Any, target: str, side: str, n: int, form: str) -> Trial:
    how: How = "control" if form.startswith("B") else "adapt"
    if n == 0:
        return Trial(f"{form} from the {side} side, 0 layers", target, spec, "scratch")
    strategy = {"kind": "layer_transfer", "side": side, "layers": n, "rest": "fresh", "freeze": not form.endswith("+")}
    chosen = with_fields(spec, {"strategies": [strategy]})
    return Trial(f"{form} from the {side} side, {n} layers", target, chosen, how)


def _layers(spec: Spec) -> tuple[str, ...]:
    """Layers that can be transferred: all where the labels are shared, else all but the head."""
    setting = prepare(on_target(spec, ((spec.sweep or SweepSection()).targets or targets_of(spec))[0]))
    model = setting.model(len(setting.domains.labels))
    layers = Plan.draw(find_layers(model, setting.example, spec.layers), {}, {}).layers
    return layers if setting.shared else layers[:-1]


def _strengths(spec: Spec, section: SweepSection) -> tuple[dict[str, Any], str, tuple[float, ...]]:
    """The method whose strength is swept, the field that holds it, and its values."""
    given = [section.strategy] if section.strategy else [one.model_dump(mode="json") for one in spec.strategies]
    for fields in given:
        field = next((name for name in _STRENGTHS if name in fields), None)
        if field is not None:
            own = fields[field]
            around = tuple(own * decade for decade in _DECADES) if own else _DECADES
            values = section.strengths or (_RHOS if field == "rho" else around)
            return {key: value for key, value in fields.items() if value is not None}, field, values
    if section.strategy:
        raise SpecError(
            f"sweep.strategy: {section.strategy} has none of the fields {', '.join(_STRENGTHS)}. Write the strength "
            "out."
        )
    return {"kind": "l2_sp", "mode": "decoupled"}, "alpha", section.strengths or tuple(10 * d for d in _DECADES)


def _curves(marks: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One for each side and form, its points by the number of layers."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for mark, runs in marks.items():
        if mark[0] == "layers":
            curves[mark[1], mark[2]].append({"n": mark[3], **_point(runs)})
    return [
        {"side": side, "form": form, "points": sorted(points, key=lambda point: point["n"])}
        for (side, form), points in curves.items()
    ]


def _point(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: interval([run["after"][name] for run in runs if run["after"][name] is not None])
        for name in ("target", "source")
    }


def _path(runs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The mean over runs of plain fine-tuning at each point between source and adapted weights."""
    points: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for at in run["path"]:
            for name in ("target", "source"):
                if name in at:
                    points[at["t"]][name].append(at[name][metric])
    return [
        {"t": t, **{name: interval(values) for name, values in found.items()}} for t, found in sorted(points.items())
    ]
