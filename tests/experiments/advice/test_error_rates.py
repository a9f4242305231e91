"""Advice for recognizers: by the source model's error rate, and by how much speech there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

import conservtl as ctl
from conservtl.experiments.advice.error_rates import STEPS, ErrorEvidence, T, advise_by_errors

USUAL = ErrorEvidence(
    shift="speaker",
    metric="word error rate",
    target=0.4,
    source=0.03,
    utterances=10,
    seconds=32.0,
    unlabelled=0,
    hypotheses=False,
    parameters=140_000,
    layers=("subsampling", "blocks.0", "blocks.1", "blocks.2", "head"),
    epochs=10,
    steps=1,
    left_out=(),
)


def advised(**changes):
    advice = advise_by_errors(replace(USUAL, **changes))
    return (
        advice,
        {choice.what: choice.reason for choice in advice.choices},
        {one["kind"]: one for one in advice.strategies},
    )


def test_the_usual_case():
    advice, said, strategies = advised()
    assert advice.strategies == ({"kind": "weight_interpolation", "t": T},)
    assert ctl.recipe("recognizer").strategies[-1].t > T, "which compares with the source too"
    assert "word error rate of 40.0% on the shots, and 3.0% on its own training data" in said["distance"]
    assert "apart" in said["distance"]
    assert (advice.training["epochs"], STEPS) == (120, 120)
    assert set(strategies) == {"weight_interpolation"}
    assert "60% of what the source model hears is right" in said["unlabelled"]


@pytest.mark.parametrize(
    ("target", "source", "distance", "t"),
    [(0.08, 0.03, "near", 0.4), (0.0801, 0.03, "apart", 0.4), (0.59, None, "apart", 0.4), (0.6, 0.03, "far", 0.7)],
)
def test_the_error_rate_says_how_far_the_domains_are(target, source, distance, t):
    _, said, strategies = advised(target=target, source=source)
    assert f"The domains are {distance} (" in said["distance"]
    assert strategies["weight_interpolation"]["t"] == t
    assert ("little to gain" in said["distance"]) == (distance == "near")


@pytest.mark.parametrize(("seconds", "amount"), [(19.9, "little"), (20, "medium"), (599, "medium"), (600, "much")])
def test_seconds_of_speech_say_how_much_is_trained(seconds, amount):
    _, said, strategies = advised(seconds=seconds)
    assert amount in said["amount"]
    assert ("layer_transfer" in strategies) == (amount == "little")
    assert ("discriminative_lr" in strategies) == (amount == "much")
    if amount == "little":
        assert strategies["layer_transfer"] == {"kind": "layer_transfer", "side": "output", "layers": 2}
    if amount == "much":
        assert strategies["discriminative_lr"] == {"kind": "discriminative_lr", "decay": 0.7, "toward": "input"}
        assert "unlabelled" not in said


def test_hypotheses_that_are_mostly_wrong_are_not_recommended():
    assert "unlabelled" not in advised(target=0.55)[1]


def test_utterances_without_texts_are_learnt_from():
    _, said, strategies = advised(unlabelled=50, target=None, utterances=0, seconds=0)
    assert strategies["entropy_minimisation"]["blank"] == 0
    assert "taken as apart" in said["distance"]
    assert "50 utterances" in said["unlabelled"]


@pytest.mark.parametrize(("target", "word"), [(0.4, "right"), (0.7, "wrong")])
def test_hypotheses_that_are_asked_for_need_no_further_strategy(target, word):
    _, said, strategies = advised(unlabelled=50, hypotheses=True, target=target)
    assert "entropy_minimisation" not in strategies
    assert word in said["unlabelled"]
