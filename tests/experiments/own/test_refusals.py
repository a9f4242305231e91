"""Arguments of studies that are wrong: one sentence each before the first run; none is silently ignored."""

import math

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.spec.sections import CompareSection, SweepSection

nan, inf = math.nan, math.inf
WRONG = torch.zeros(6, 8), torch.tensor([0, 1, 2, 0, 1, -1])
NARROW = torch.zeros(6, 5), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": True}, "seeds: .*received .True"),
        ({"seed": -1}, "seed must be a whole number, 0 to 2147483647; received -1"),
        ({"seed": 1.5}, "seed must be .* received 1.5"),
        ({"seed": None}, "seed must be .* received None"),
        ({"seed": True}, "seed must be .* received True"),
        ({"baselines": None}, "baselines: .*received None"),
        ({"baselines": "from scratch"}, "baselines: .*received 'from scratch'"),
        ({"baselines": ["from scratch"] * 2}, "baselines: each must stand once; from scratch stands twice"),
        ({"baselines": ["joint training"]}, "baselines: 'joint training' needs source data .* there are none"),
        ({"rates": (1e-3, 1e-3, 1e-2)}, "rates: they must rise; received 0.001, 0.001, 0.01"),
        ({"rates": (1e-2, 1e-3, 1e-4)}, "rates: they must rise; received 0.01, 0.001, 0.0001"),
        ({"rates": (nan, 1, 2)}, "rates: .*finite.*received nan"),
        ({"variants": {"a": None}}, r"variants\['a'\] must be a list of strategies; received None"),
        ({"variants": {"a": 3}}, r"variants\['a'\] must be a list of strategies; received 3"),
        ({"variants": {"a": {"kind": "l2_sp"}}}, r"variants\['a'\] must be a list of strategies"),
        ({"variants": {1: []}}, "each must have a name, a text .*received 1"),
        ({"variants": {" ": []}}, "each must have a name, a text .*received ' '"),
        ({"labels": 3}, "labels must be two lists"),
        ({"fresh": 3}, "fresh must be a list of globs, all texts; received 3"),
        ({"fresh": [3]}, r"fresh must be a list of globs, all texts; received \[3\]"),
        ({"allow": "x"}, r"allow must be a list of globs; received the text 'x'\. Write allow=\['x'\]"),
        ({"layers": 3}, "layers must be a list of globs, all texts; received 3"),
        ({"head": 3}, "head must be a list of globs, all texts; received 3"),
        ({"rename": 3}, "rename must be {expression: replacement}; received 3"),
        ({"usual_lr": "a"}, "usual_lr must be a finite rate above 0; received 'a'"),
        ({"usual_lr": True}, "usual_lr must be a finite rate above 0; received True"),
        ({"train": WRONG}, "the training data: labels must be positions of 3 outputs.*received -1"),
        ({"train": (WRONG[0],)}, "train: an example must be .inputs, labels."),
        ({"train": (WRONG[0], WRONG[1][:0])}, "train: every tensor must have a row for each example"),
        (
            {"valid": (WRONG[0][:0], WRONG[1][:0])},
            "valid must hold examples; received none. Give at least one",
        ),
        ({"valid": NARROW}, r"valid, 'the target': the model must take .*shape \(2, 5\)"),
        ({"source_data": NARROW}, "source_data: the model must take the examples"),
    ],
)
def test_a_comparison_refuses(source, held_out, quick, network, examples, change, message):
    arguments = {"variants": {"a": []}, "train": examples(), "seeds": 1, "baselines": ["source as it is"]}
    with pytest.raises((ctl.SpecError, ctl.DataError), match=message):
        ctl.compare(network, source, held_out=held_out, training=quick, **(arguments | change))


@pytest.mark.parametrize("name", ["target", "source"])
def test_a_held_out_set_is_tried_before_a_run(source, held_out, quick, network, examples, name):
    sets = held_out | {name: NARROW}
    with pytest.raises(ctl.DataError, match=rf"held_out\['{name}'\].*: the model must take the examples.*\(2, 5\)"):
        ctl.compare(network, source, {"a": []}, examples(), sets, quick, seeds=1)
    with pytest.raises(ctl.DataError, match=rf"held_out\['{name}'\]: the labels must be positions .*received 9"):
        ctl.compare(network, source, {"a": []}, examples(), held_out | {name: (WRONG[0], WRONG[1] + 7)}, quick, seeds=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": [1, 1.0]}, "strengths: each must stand once; 1.0 stands twice"),
        ({"strengths": [nan]}, "strengths: .*received nan"),
        ({"strengths": [-1]}, "strengths: .*received -1"),
        ({"strengths": 1.0}, "strengths: .*received 1.0"),
        ({"strengths": "1"}, "strengths: .*received '1'"),
        ({"strengths": [True]}, "strengths: .*received 'True'"),
        ({"numbers": [1, 1]}, "numbers: each must stand once; 1 stands twice"),
        ({"numbers": 1}, "numbers: .*received 1"),
        ({"numbers": [9]}, "9 is more than the model has"),
        ({"sides": []}, "sides: .*at least 1 item"),
        ({"sides": None}, "sides: .*received None"),
        ({"sides": ["input", "input"]}, "sides: each must stand once; input stands twice"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_a_sweep_refuses(source, held_out, quick, network, examples, change, message):
    arguments = {"seeds": 1, "numbers": [1], "sides": ["input"], "controls": False, "strengths": [1.0]}
    with pytest.raises(ctl.SpecError, match=message):
        ctl.sweep(network, source, examples(), held_out, quick, **(arguments | change))


def test_an_empty_list_of_strengths_sweeps_none(source, held_out, quick, network, examples):
    found = ctl.sweep(network, source, examples(24), held_out, quick, seeds=1, numbers=range(1, 2), sides=["input"],
                      controls=False, strengths=[])  # fmt: skip
    assert found.best is None
    assert found.strengths() is None
    assert {run["variant"].partition(" ")[0] for run in found.runs} == {"AnB", "AnB+", "fine-tuning"}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (CompareSection, "targets", ["a", "b", "a"]),
        (CompareSection, "shots", [5, {"up_to": 5}, 5]),
        (SweepSection, "layers", [1, 2, 1]),
        (SweepSection, "targets", ["a", "a"]),
    ],
)
def test_a_spec_that_names_a_run_twice_is_refused(section, field, value):
    """Its runs would be counted twice, and intervals would be narrower than the data say."""
    with pytest.raises(ValueError, match=f"{value[-1]} stands twice"):
        section.model_validate({field: value})
    section.model_validate({field: value[:-1]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": (WRONG[0], WRONG[1] + 7)}, ctl.SpecError, "labels must be positions of 3 outputs.*received 7"),
        ({"train": WRONG}, ctl.SpecError, "labels must be positions of 3 outputs.*received -1"),
        ({"train": (WRONG[0][:0], WRONG[1][:0])}, ctl.DataError, "one common length above 0"),
        ({"train": []}, ctl.DataError, "received none|no examples"),
        ({"steps": 12.5}, ctl.SpecError, "range test: finite rates must rise .* in 12.5"),
        ({"steps": True}, ctl.SpecError, "range test: finite rates must rise .* in True"),
        ({"steps": 9}, ctl.SpecError, "in 10 steps at least; .* in 9"),
        ({"lowest": nan}, ctl.SpecError, "received nan to 1.0"),
        ({"lowest": "a"}, ctl.SpecError, "received 'a' to 1.0"),
        ({"highest": inf}, ctl.SpecError, "received 1e-06 to inf"),
        ({"highest": None}, ctl.SpecError, "received 1e-06 to None"),
        ({"seed": -1}, ctl.SpecError, "seed must be a whole number, 0 to 4294967295; received -1"),
        ({"valid": 3}, ctl.SpecError, "valid must name its sets"),
        ({"forward": 3}, ctl.SpecError, "forward must be a function; received 3"),
        ({"metrics": 3}, ctl.SpecError, "metrics must be a function; received 3"),
        ({"augment": 3}, ctl.SpecError, "augment must be a function .*received 3"),
        ({"augment": 3, "fit": True}, ctl.SpecError, "augment must be a function .*received 3"),
        ({"forward": 3, "fit": True}, ctl.SpecError, "forward must be a function; received 3"),
    ],
)
def test_a_range_test_refuses(source, network, examples, change, error, message):
    """So does ``fit``, for what both take."""
    arguments = {"train": examples(24), "training": ctl.Training(device="cpu")}
    fits = change.get("fit", False)
    change = {name: value for name, value in change.items() if name != "fit"}
    call = ctl.fit if fits else ctl.lr_find
    with pytest.raises(error, match=message):
        call(ctl.adapt(network(), source), **(arguments | ({} if fits else {"steps": 12}) | change))


def test_a_recommendation_names_what_it_takes():
    with pytest.raises(ctl.SpecError, match=r"recommend takes a spec, .* or a model .*received int"):
        ctl.recommend(3)
