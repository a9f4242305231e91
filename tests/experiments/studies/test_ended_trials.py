"""Trials of a search that end early: given up behind the median, or failed with their reason."""

from __future__ import annotations

import pytest

import conservtl as ctl
from conservtl.experiments.studies import search
from conservtl.experiments.studies.search import OneTrial, Search
from conservtl.experiments.studies.tuning import tune

pytest.importorskip("optuna")


@pytest.fixture
def marked(speech_fields):
    speech_fields["source"]["training"]["epochs"] = 1
    training = {"epochs": {"range": [2, 9]}, "lr": 1e-3}
    return {**speech_fields, "data": {**speech_fields["data"], "validation": 0.5}, "training": training}


def trial_of(scores):
    """Return a stand-in of a run: the scores of its two epochs, told one after the other."""
    runs = iter(scores)

    def run(trial, *, judge, tell):
        metric = trial.spec.problem.headline.metric
        for epoch, score in enumerate(values := next(runs), 1):
            if isinstance(score, Exception):
                raise score
            tell({"epoch": epoch, "valid": {"target": {metric: score}, "source": {metric: score}}})
        return {"valid": {"target": values[-1], "source": values[-1]}, "seconds": 1.0}

    return run


def test_trials_that_fall_behind_are_given_up_and_those_that_cannot_run_fail_with_their_reason(
    marked, tmp_path, monkeypatch
):
    """Optuna's pruner watches from the sixth trial on: that one is below the median of the first epoch."""
    behind = (0.1, AssertionError("its second epoch was trained"))
    wrong = (ctl.SpecError("training.lr: too high. Lower it."),)
    monkeypatch.setattr(search, "run_trial", trial_of([*[(0.8, 0.9)] * 5, behind, wrong, (0.8, 0.95)]))
    result = tune({**marked, "tune": {"trials": 8, "prune": True}}, tmp_path)
    trials = result["trials"]
    assert [trial["state"] for trial in trials] == [*["complete"] * 5, "pruned", "failed", "complete"]
    assert [trial["why"] for trial in trials] == [None] * 6 + ["training.lr: too high. Lower it.", None]
    assert result["best"] == [7]
    assert all(isinstance(trial["params"]["training.epochs"], int) for trial in trials)
    assert all(2 <= trial["params"]["training.epochs"] <= 9 for trial in trials)


def test_without_pruning_no_trial_is_given_up(marked, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_trial", trial_of([*[(0.8, 0.9)] * 5, (0.1, 0.2)]))
    result = tune({**marked, "tune": {"trials": 6, "prune": False}}, tmp_path)
    assert {trial["state"] for trial in result["trials"]} == {"complete"}
    assert result["trials"][5]["target"] == 0.2


def test_a_lost_worker_leaves_its_trial_to_another(marked, tmp_path):
    work = OneTrial(Search(marked, tmp_path, ()), 3)
    assert (work.name, len(work), work.rest()) == ("worker 3 of the search", 1, [work])
