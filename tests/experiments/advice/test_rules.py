"""The practitioner's table: what follows from which numbers."""

import dataclasses

import pytest

from conservtl.experiments.advice.evidence import Evidence
from conservtl.experiments.advice.rules import advise
from conservtl.experiments.advice.thresholds import ENOUGH, FAR_DECAY, NEAR_DECAY, far, size
from conservtl.methods import as_strategy

BASE = Evidence(
    shift="speaker",
    classes=10,
    examples=250,
    fewest=25,
    most=25,
    parameters=300_000,
    layers=("a", "b", "c", "d"),
    head="e",
    epochs=50,
    steps=4,
    distance=1.2,
    distances={"d": 1.2},
    statistics=0.2,
    batch_norms=True,
    log_me={"a": -0.5, "b": -0.1, "c": 0.2, "d": 0.1},
    leep=-0.3,
    entropy=2.3,
    best_layers=("c", "d"),
    features_accuracy=None,
    left_out=(),
)


def given(**changes):
    return dataclasses.replace(BASE, **changes)


def kinds(advice):
    return {fields["kind"]: as_strategy(fields) for fields in advice.strategies}


@pytest.mark.parametrize(
    ("fewest", "examples", "parameters", "expected"),
    [
        (1, 10, 300_000, "little"),
        (5, 50, 300_000, "little"),
        (5, 50, 100_000, "medium"),  # a small network needs fewer
        (25, 250, 25_000_000, "medium"),
        (100, 1000, 10**9, "much"),  # many a class serve any network
    ],
)
def test_size_is_by_examples_a_class_or_a_parameter_whichever_says_more(fewest, examples, parameters, expected):
    assert size(given(fewest=fewest, examples=examples, parameters=parameters)) == expected


def test_distance_is_the_first_that_was_measured():
    assert [far(given(distance=value))[0] for value in (1.2, 1.9)] == [False, True]
    assert [far(given(distance=None, statistics=value))[0] for value in (0.2, 0.5)] == [False, True]
    assert [far(given(distance=None, statistics=None, leep=value))[0] for value in (-0.3, -2.0)] == [False, True]


@pytest.mark.parametrize(("shift", "keeps"), [("speaker", {"feature_conservation"}), ("input", {"l2_sp"})])
def test_where_the_labels_stay_the_input_side_is_tuned_and_the_source_held_to(shift, keeps):
    found = kinds(advise(given(shift=shift)))
    assert found["discriminative_lr"].toward == "input"
    assert keeps <= found.keys()
    assert (found["norm_adaptation"].statistics, found["norm_adaptation"].train) == ("instance", "all")
    assert advise(given(shift=shift)).training["batch_norm"] == "eval"
    held = kinds(advise(given(shift=shift, fewest=1, examples=10)))
    assert held["layer_transfer"].side == "output"
    assert "discriminative_lr" not in held


def test_without_batch_norms_there_is_nothing_to_mix():
    assert "norm_adaptation" not in kinds(advise(given(batch_norms=False)))
    assert "norm_adaptation" not in kinds(advise(given(shift="labels", features_accuracy=0.5)))


def test_distance_sets_the_rates_of_the_kept_side():
    rates = [kinds(advise(given(distance=distance)))["discriminative_lr"].decay for distance in (1.0, 1.9)]
    assert rates == [NEAR_DECAY, FAR_DECAY]


def test_new_labels_keep_the_input_side():
    """Medium: the head first where the domains are near, in stages where they are far; much: at once."""
    near = kinds(advise(given(shift="labels", features_accuracy=0.5)))
    assert near["discriminative_lr"].toward == "output"
    assert {"lp_ft", "weight_interpolation"} <= near.keys()
    apart = kinds(advise(given(shift="labels", features_accuracy=0.5, distance=1.9)))
    assert [stage.train for stage in apart["gradual_unfreezing"].phases] == [("e",), ("c", "d", "e"), None]
    much = kinds(advise(given(shift="labels", features_accuracy=0.5, fewest=100, examples=1000)))
    assert not {"lp_ft", "gradual_unfreezing", "feature_extraction"} & much.keys()
    assert advise(given(shift="labels", features_accuracy=0.5)).training["batch_norm"] == "train"


@pytest.mark.parametrize("changes", [{"fewest": 5, "examples": 50}, {"features_accuracy": ENOUGH}])
def test_little_data_or_features_that_are_enough_leave_the_body_alone(changes):
    """The features are those that the measured curve names."""
    found = kinds(advise(given(shift="labels", **changes)))
    assert list(found) == ["feature_extraction"]
    assert (found["feature_extraction"].classifier, found["feature_extraction"].layers) == ("svm", ("c", "d"))


def test_there_are_steps_enough_and_never_fewer_epochs_than_asked_for():
    raised = advise(given(epochs=10, steps=4))
    assert raised.training["epochs"] == 50
    assert any(choice.what == "length" for choice in raised.choices)
    assert advise(given(epochs=80, steps=4)).training["epochs"] == 80


@pytest.mark.parametrize("shift", ["labels", "speaker", "input"])
@pytest.mark.parametrize("distance", [1.0, 1.9, None])
@pytest.mark.parametrize("fewest", [1, 25, 100])
def test_every_choice_has_a_sentence_with_no_reason_twice(shift, distance, fewest):
    """And every cell of the table gives strategies that specs know."""
    advice = advise(given(shift=shift, distance=distance, fewest=fewest, examples=10 * fewest))
    assert kinds(advice)
    assert all(choice.reason.endswith(".") for choice in advice.choices)
    assert len({choice.what for choice in advice.choices}) == len(advice.choices)
