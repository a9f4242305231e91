"""Searches of a plan: each candidate is tried on a copy, and the plan is drawn up with the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.training import Training
from conservtl.errors import PlanError, SpecError
from conservtl.layers.copying import deep_copy
from conservtl.plan.decision import Search

__all__ = ["Scores", "Trial", "run_searches"]

_SHARE = 5  # a trial takes a fifth of the run's epochs, unless the search says how many

Trial = Callable[[Adaptation, Training], float]
Scores = dict[str, dict[str, float]]


def run_searches(
    adaptation: Adaptation,
    valid: Mapping[str, object],
    training: Training,
    generators: Sequence[torch.Generator],
    trial: Trial,
) -> Scores:
    """Carry out the searches of a plan, one after the other, and draw up the plan with what they decide.

    ::

        for each search that the plan holds:
            for each candidate: draw up a copy's plan with its facts, train the copy, score it
            draw up the plan with the facts that the search decides on

    All candidates of a search start from the same weights and see the same batches in the same order.

    Returns:
        Name of each search -> candidate -> its score.
    """
    results: Scores = {}
    while adaptation.plan.searches:
        search = adaptation.plan.searches[0]
        if "target" not in valid:
            raise SpecError(f"{search.by} chooses on a validation part: pass valid={{'target': data}}.")
        settings = _trial_settings(search, training)
        scores = {}
        for candidate, facts in search.trials().items():
            copied = deep_copy(adaptation)
            _decide(copied, search, facts)
            with preserve_rng(generators):
                scores[candidate] = trial(copied, settings)
        _decide(adaptation, search, search.decide(scores))
        results[search.name] = scores
    return results


def _trial_settings(search: Search, training: Training) -> Training:
    """Return the settings of a trial: shorter, and evaluated once, at its end."""
    epochs = search.epochs or max(1, training.epochs // _SHARE)
    changes = {"epochs": epochs, "evaluate_every": epochs, "patience": None}
    return training.model_copy(update={**changes, "keep": "target" if training.keep == "target" else "last"})


def _decide(adaptation: Adaptation, search: Search, facts: Mapping[str, str]) -> None:
    """Draw up the plan with the facts of a candidate."""
    adaptation.replan(**facts)
    if any(left.name == search.name for left in adaptation.plan.searches):
        raise PlanError(
            f"{search.by} still searches for {search.name!r} with the facts {dict(facts)}. Read them from plan.facts "
            "in apply, and decide."
        )
