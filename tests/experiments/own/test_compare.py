"""compare on a program's own model and data is the study of a spec: same runs, same statistics, nothing changed."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.spec.sections import BASELINES
from conservtl.experiments.studies.bootstrap import bootstrap

SOME = torch.zeros(6, 8), torch.arange(6) % 3
FEW = ["source as it is", "fine-tuning, middle rate"]


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_run_is_adapt_and_fit_with_the_seed(source, held_out, quick, network, examples):
    """Reference by hand: the model of the seed, adapted, trained by fit with the seed, scored on the held-out sets."""
    strategies = [ctl.L2SP(alpha=0.1)]
    found = ctl.compare(network, source, {"L2-SP": strategies}, examples(24, 1.0), held_out, quick, seeds=2, seed=3,
                        baselines=["source as it is"])  # fmt: skip
    assert [run["seed"] for run in found.runs] == [3, 3, 4, 4]
    for run in (run for run in found.runs if run["variant"] == "L2-SP"):
        torch.manual_seed(run["seed"] + 2**31)
        adaptation = ctl.adapt(network(), source, strategies)
        ctl.fit(adaptation, examples(24, 1.0), training=quick, seed=run["seed"])
        for name, (inputs, labels) in held_out.items():
            with torch.no_grad():
                right = (adaptation.model.eval()(inputs).argmax(-1) == labels).float().mean()
            assert run["after"][name] == pytest.approx(right.item(), abs=1e-6)
    with torch.no_grad():
        before = {n: (source(x).argmax(-1) == y).float().mean().item() for n, (x, y) in held_out.items()}
    assert found.runs[0]["before"] == pytest.approx(before)
    assert found.runs[0]["after"] == pytest.approx(before)  # the source as it is


def test_differences_are_paired_by_seed_and_bootstrapped(source, held_out, quick, network, examples):
    found = ctl.compare(network, source, {"L2-SP": [ctl.L2SP()], "plain": []}, examples(24, 1.0), held_out, quick,
                        seeds=3, baselines=FEW)  # fmt: skip

    def score(run):
        target, kept = run["after"]["target"], run["after"]["source"]
        return 2 * target * kept / (target + kept)

    def scores(variant):
        return [score(run) for run in found.runs if run["variant"] == variant]

    reference = max(FEW, key=lambda name: sum(scores(name)))
    row = next(row for row in found.rows if row["variant"] == "L2-SP")
    expected = bootstrap([[a - b for a, b in zip(scores("L2-SP"), scores(reference), strict=True)]])
    assert row["difference"]["mean"] == pytest.approx(expected.mean)
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((expected.low, expected.high))
    assert found.best == max(["L2-SP", "plain"], key=lambda name: sum(scores(name)))
    assert not found.wins  # three pairs are too few


def test_nothing_of_the_caller_is_changed_and_a_repetition_is_equal(source, held_out, quick, network, examples):
    model = network().train()
    model[1].eval()
    weights, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    theirs, before = copy.deepcopy(source.state_dict()), states()

    def once():
        return ctl.compare(model, source, {"a": [ctl.L2SP()]}, examples(24, 1.0), held_out, quick, seeds=1)

    first = once()
    assert states() == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(theirs[name], value) for name, value in source.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    torch.rand(5)
    second = once()
    assert [run["after"] for run in first.runs] == [run["after"] for run in second.runs]


def test_all_baselines_are_added_and_joint_training_needs_source_data(source, held_out, quick, network, examples):
    def labels(**options):
        found = ctl.compare(network, source, {"a": []}, examples(24, 1.0), held_out, quick, seeds=1, **options)
        return [row["variant"] for row in found.rows]

    assert labels(source_data=examples(30)) == [*BASELINES, "a"]
    assert labels() == [name for name in BASELINES if name != "joint training"] + ["a"]


def test_default_baselines_that_do_not_apply_are_left_out_with_a_line_each(source, held_out, quick, network, examples):
    """A model whose values cannot be drawn anew, and no source data."""

    class Shifted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.shift = inner, torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            return self.inner(inputs) + self.shift

    pair = (Shifted(network()), Shifted(source))
    found = ctl.compare(*pair, {"a": []}, examples(24, 1.0), held_out, quick, seeds=1)
    assert not {"joint training", "from scratch"} & {row["variant"] for row in found.rows}
    joint, scratch = found.result["left_out"]
    assert joint == "joint training: it needs source data with the target's labels, and there are none"
    assert scratch.startswith("from scratch: ")


def test_test_parts_select_nothing(source, held_out, network, examples):
    """With the target's test labels permuted, every weight that is kept is the same: the source's score shows it."""
    training = ctl.Training(epochs=4, lr=1e-2, device="cpu", keep="harmonic", patience=1)
    other = held_out | {"target": (held_out["target"][0], held_out["target"][1].roll(1))}
    runs = [
        ctl.compare(network, source, {"a": [ctl.L2SP()]}, examples(24, 1.0), sets, training, seeds=1, valid=0.3,
                    source_data=examples(30), baselines=["fine-tuning, high rate"]).runs
        for sets in (held_out, other)
    ]  # fmt: skip
    assert [run["after"]["source"] for run in runs[0]] == [run["after"]["source"] for run in runs[1]]
    assert [run["after"]["target"] for run in runs[0]] != [run["after"]["target"] for run in runs[1]]


def test_several_targets_are_clusters_of_one_table(source, held_out, quick, network, examples):
    train = {"near": examples(24, 0.5), "far": examples(24, 2.0)}
    sets = held_out | {"target": {"near": examples(30, 0.5, seed=1), "far": examples(30, 2.0, seed=1)}}
    found = ctl.compare(network, source, {"a": []}, train, sets, quick, seeds=1, baselines=FEW)
    assert {run["target"] for run in found.runs} == {"near", "far"}
    assert set(found.rows[0]["per_target"]) == {"near", "far"}
    with pytest.raises(ctl.DataError, match=r"held_out must have a set for each target of train \(near, far\)"):
        ctl.compare(network, source, {"a": []}, train, held_out, quick)


def test_shots_are_drawn_by_the_seed(source, held_out, quick, network, examples):
    found = ctl.compare(network, source, {"a": []}, examples(60, 1.0), held_out, quick, seeds=2, shots=2, baselines=FEW)
    assert all(run["taken"] == {"0": 2, "1": 2, "2": 2} for run in found.runs)
    with pytest.raises(ctl.DataError, match=r"label 0 has 8 examples; 9 were asked for\. Ask for at most 8"):
        ctl.compare(network, source, {"a": []}, examples(24), held_out, quick, shots=9, baselines=FEW)


def test_a_head_for_other_labels_is_fresh_and_the_source_answers_with_its_own(
    source, held_out, quick, network, examples
):
    sets = {"target": examples(30, 1.0, classes=4, seed=1), "source": held_out["source"]}
    found = ctl.compare(lambda: network(4), source, {"frozen": [ctl.FeatureExtraction()]},
                        examples(24, 1.0, classes=4), sets, quick, seeds=1, baselines=["source as it is"])  # fmt: skip
    frozen = next(run for run in found.runs if run["variant"] == "frozen")
    assert frozen["before"]["source"] == frozen["after"]["source"]  # the body is the source's


def test_a_state_dict_is_a_source(source, held_out, quick, network, examples):
    runs = [
        ctl.compare(network, given, {"a": [ctl.OutputConservation()]}, examples(24, 1.0), held_out, quick, seeds=1,
                    baselines=FEW).runs
        for given in (source, source.state_dict())
    ]  # fmt: skip
    assert [run["after"] for run in runs[0]] == [run["after"] for run in runs[1]]


def test_a_model_that_is_its_own_source(source, held_out, quick, examples):
    """Training from scratch begins at random values, not at the pretrained ones."""
    found = ctl.compare(source, ctl.itself(missing=[]), {"a": []}, examples(24, 1.0), held_out, quick, seeds=1,
                        scratch_rate=1e-9, baselines=["source as it is", "from scratch"])  # fmt: skip
    by = {run["variant"]: run["after"] for run in found.runs}
    assert by["from scratch"] != by["source as it is"]
    fresh = ctl.compare(source, ctl.itself(missing=["4"]), {"a": []}, examples(24, 1.0),
                        {"target": held_out["target"]}, quick, seeds=1, baselines=FEW)  # fmt: skip
    assert fresh.runs[0]["after"]["source"] is None
    with pytest.raises(ctl.SourceError, match=r"it has no head: '4\.weight' is given as missing"):
        ctl.compare(source, ctl.itself(missing=["4"]), {"a": []}, examples(24), held_out, quick)


def test_a_module_without_reset_has_no_run_from_scratch(held_out, quick, examples):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

        def forward(self, inputs):
            return self.layer(self.scale * inputs)

    found = ctl.compare(Scaled(), Scaled(), {"a": []}, examples(24), held_out, quick, seeds=1,
                        baselines=["source as it is", "from scratch"])  # fmt: skip
    assert "from scratch" not in [row["variant"] for row in found.rows]
    assert "Left out: from scratch: model: to begin at random values" in str(found)
    with pytest.raises(ctl.SpecError, match=r"'the model' \(Scaled\) holds parameters and has none"):
        ctl.sweep(Scaled(), Scaled(), examples(24), held_out, quick)


def test_regression_is_judged_by_the_loss(held_out, quick, examples):
    inputs = examples(24)[0]
    data = inputs, inputs[:, :1] * 2
    found = ctl.compare(lambda: nn.Linear(8, 1), nn.Linear(8, 1), {"a": [ctl.L2SP()]}, data,
                        {"target": data}, quick, loss=nn.MSELoss(), seeds=1, baselines=FEW)  # fmt: skip
    assert found.result["metric"]["better"] == "lower"
    assert "loss" in str(found)


def test_an_optimizer_class_reaches_every_run(source, held_out, network, examples):
    made = []

    class Counting(torch.optim.SGD):
        def __init__(self, params, lr):
            made.append(lr)
            super().__init__(params, lr)

    training = ctl.Training(epochs=1, lr=0.02, device="cpu")
    ctl.compare(network, source, {"a": []}, examples(24), held_out, training, seeds=1, optimizer=Counting,
                baselines=["source as it is"])  # fmt: skip
    assert made == [0.02]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variants": [ctl.L2SP()]}, ctl.SpecError, "variants must be strategies by name"),
        ({"variants": {}}, ctl.SpecError, "received none"),
        ({"variants": {"a": ctl.L2SP()}}, ctl.SpecError, r"variants\['a'\] must be a list of strategies"),
        ({"variants": {"from scratch": []}}, ctl.SpecError, "are names of baselines"),
        ({"held_out": {"test": SOME}}, ctl.DataError, "held_out must have 'target'"),
        ({"held_out": {"target": SOME, "test": SOME}}, ctl.DataError, "held_out must be {'target'"),
        ({"train": torch.utils.data.DataLoader([1])}, ctl.DataError, "Pass its dataset"),
        ({"train": (torch.zeros(3, 8), torch.zeros(2).long())}, ctl.DataError, "received 0: 3, 1: 2 rows"),
        ({"train": (torch.zeros(0, 8), torch.zeros(0).long())}, ctl.DataError, "there must be examples"),
        ({"train": (torch.zeros(6, 8), torch.full((6,), 5))}, ctl.DataError, "received 5"),
        ({"valid": 1.5}, ctl.DataError, r"a part of train in \[0, 1\); received 1.5"),
        ({"alfa": 1}, ctl.SpecError, "'alfa' is none of the options"),
        ({"shots": 0}, ctl.SpecError, "shots must be a number of examples of each class, 1 at least.*received 0"),
        ({"shots": -1}, ctl.SpecError, "shots must be a number of examples.*received -1"),
        ({"metrics": 3}, ctl.SpecError, "metrics must be a function, as for fit; received 3"),
        ({"augment": "flip"}, ctl.SpecError, "augment must be a function, as for fit; received 'flip'"),
        ({"training": {"epochs": 1}}, ctl.SpecError, "training must be a ctl.Training; received dict"),
        ({"model": lambda classes: classes}, ctl.SpecError, "a function without arguments.*'classes'"),
        ({"model": 3}, ctl.SpecError, "or a function that returns one; received int"),
        ({"model": lambda: 3}, ctl.SpecError, r"model\(\) must return a torch.nn.Module; it returns int"),
        ({"seeds": 0}, ctl.SpecError, "seeds: Input should be greater than or equal to 1; received 0"),
        ({"baselines": ["none"]}, ctl.SpecError, "baselines: Input should be 'source as it is'"),
        ({"metrics": lambda outputs, batch: {"mcc": 0.1}}, ctl.SpecError, "of the metrics, mcc, it must be known"),
        ({"metrics": lambda outputs, batch: {"f1": 0.5, "mcc": 0.1}}, ctl.SpecError, "of the metrics, f1, mcc, it"),
        ({"fresh": "heat"}, ctl.SpecError, "fresh: 'heat': must match at least one"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(source, held_out, quick, change, error, message, network, examples):
    arguments = {"model": network, "source": source, "variants": {"a": []}, "train": examples(), "held_out": held_out}
    with pytest.raises(error, match=message):
        ctl.compare(**({"seeds": 1, "training": quick} | arguments | change))


def test_a_function_that_returns_the_same_model_is_refused(source, held_out, quick, network, examples):
    model = network()
    with pytest.raises(ctl.SpecError, match=r"model\(\) must return a new model in each call"):
        ctl.compare(lambda: model, source, {"a": []}, examples(), held_out, quick, seeds=1)


def test_a_model_is_no_source_of_itself_without_a_word(source, held_out, quick, examples):
    with pytest.raises(ctl.SourceError, match="the source is the model itself, and nothing in it is fresh"):
        ctl.compare(source, source, {"a": []}, examples(), held_out, quick, seeds=1)


def test_proxies_reach_the_variants_that_compare(network, source, examples, held_out, quick):
    """And no other: a baseline trains without."""
    seen = []

    def other(batch, generator):
        seen.append(torch.rand((), generator=generator))
        return 2 * batch[0], batch[1]

    def found(variants):
        seen.clear()
        options = {"baselines": ["fine-tuning, low rate"], "seeds": 1, "proxies": other}
        ctl.compare(network, source, variants, examples(20, 1.0), held_out, quick, **options)
        return len(seen)

    assert found({"KL": [ctl.OutputConservation(weight=1.0)]}) == 2 * -(-20 // quick.known_batch_size)
    assert found({"L2-SP": [ctl.L2SP()]}) == 0
