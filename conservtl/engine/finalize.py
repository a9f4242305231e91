"""The end of a run: the path to the trained weights, and the plan's ``after`` decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.engine.batch import Batches
from conservtl.engine.batching import Contents, undivided
from conservtl.engine.criterion import ACCURACY, Criterion, score
from conservtl.engine.evaluation import Functions, Holdout, evaluate
from conservtl.engine.held import Held
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.session import Session
from conservtl.functions import accuracy
from conservtl.layers import unwrap
from conservtl.runtime.preserve import eval_mode
from conservtl.weights.interpolation import grid
from conservtl.weights.path import WeightPath

__all__ = ["Ended", "finish"]

_POINTS = 11  # points on a path, both ends included

Evaluation = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Ended:
    """Results after training.

    Args:
        after: name of each ``after`` decision, and ``path`` for ``training.keep`` -> its facts.
        path: for each point that was evaluated: t, metrics of each set, and whether it was kept.
        best: the validation score of the point chosen on the path; None if none was chosen.
    """

    after: dict[str, Any]
    path: tuple[dict[str, Any], ...]
    best: float | None


def finish(
    session: Session,
    functions: Functions,
    batches: Batches,
    valid: Mapping[str, Holdout],
    shown: Mapping[str, Holdout],
) -> Ended:
    """Evaluate the path, keep its best point if the settings say so, and carry out the plan's ``after`` decisions.

    Points are chosen on the ``valid`` sets; the ``shown`` ones are evaluated, and nothing is chosen on them.
    """
    adaptation, keep, select = session.adaptation, session.training.keep, session.training.select
    adaptation.restore_weights()
    target = valid.get("target")

    def measure(sets: Mapping[str, Holdout]) -> Evaluation:
        return {name: evaluate(session.model, data, functions, session.device) for name, data in sets.items()}

    chooses = keep == "path" or any(type(decision).scored for decision in adaptation.plan.after)
    margin = _margin(session, target, functions, select) if target is not None and chooses else 0.0
    points: dict[float, Evaluation] = {}
    after: dict[str, Any] = {}
    best = None
    if shown or keep == "path":
        line = WeightPath(unwrap(adaptation.model), adaptation.start)
        for t in grid(_POINTS) if shown else ():
            line.move(t)
            points[t] = measure(shown)
        line.move(1.0)
        if keep == "path":
            after["path"], best = _chosen(
                line, lambda: measure(valid), lambda found: score(found, keep, select), margin
            )
        del line  # frees its copy of the weights
    adaptation.bound.endings.done = {}  # of an earlier run
    after |= adaptation.finish(
        Contents(batches),
        forward=functions.forward,
        score=(lambda: score(measure(valid), keep, select)) if target is not None else None,
        valid=Contents(undivided(target.data)) if target is not None else None,
        objective=_objective(target, functions),
        margin=margin,
    )
    session.average_statistics()  # those that were computed anew are of each process's part
    kept = next((facts["t"] for facts in after.values() if "t" in facts), None if after else 1.0)
    if shown and kept is not None and kept < 1:
        points[kept] = measure(shown)  # the model as it is now, with its statistics
    return Ended(after, tuple({"t": t, **points[t], "kept": t == kept} for t in sorted(points)), best)


def _chosen(
    line: WeightPath, measure: Callable[[], Evaluation], scored: Callable[[Evaluation], float], margin: float
) -> tuple[dict[str, Any], float]:
    """Move the model to the best point of a path; return the facts, and the point's score."""
    evaluations: list[Evaluation] = []

    def judge() -> float:
        evaluations.append(measure())
        return scored(evaluations[-1])

    t, scores = line.choose(_POINTS, judge, margin)
    points = [{"t": at, **found} for at, found in zip(scores, evaluations, strict=True)]
    return {"t": t, "points": points}, scores[t]


def _margin(session: Session, target: Holdout, functions: Functions, select: Criterion | None) -> float:
    """Return half of what one example of the target changes in the accuracy; 0 for another metric."""
    if select not in (None, ACCURACY):
        return 0.0
    data: Batches = target.data
    model = session.model
    if (target.metrics or functions.metrics) is accuracy:  # not defined for all outputs and labels
        with eval_mode(model), preserve_rng(), torch.no_grad():
            content = next(iter(data.epoch())).content
            if not accuracy((target.forward or functions.forward)(model, content), content):
                return 0.0
    with preserve_rng():
        if isinstance(data, Held):
            return 0.5 / data.length
        return 0.5 / sum(data.processes.gathered(sum(batch.size for batch in data.epoch())))


def _objective(data: Holdout | None, functions: Functions) -> Callable[[nn.Module, Any], Tensor]:
    """Return the function (model, batch) -> loss of a set."""
    own = functions.of(data)
    return lambda model, batch: own.loss(own.forward(model, batch), batch)
