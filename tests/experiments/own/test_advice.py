"""sweep, recommend and lr_find on a program's own model and data."""

import copy

import pytest
import torch

import conservtl as ctl


def test_a_sweep_transfers_layers_to_random_ones(source, held_out, quick, examples):
    """The model that is handed over holds the source's values; layers that are not transferred begin anew."""
    model, still = copy.deepcopy(source), quick.model_copy(update={"lr": 1e-9})
    found = ctl.sweep(
        model, source, examples(24, 1.0), held_out, still, seeds=1, numbers=[0, 2], sides=["input"], strengths=[1, 10]
    )
    plain = next(run for run in found.runs if run["variant"] == "fine-tuning")
    assert plain["after"] == plain["before"]  # at this rate nothing moves
    for run in (run for run in found.runs if run["variant"].startswith("AnB")):
        assert run["after"]["source"] < plain["before"]["source"]  # the head at least is random
    assert found.best in (1, 10)
    assert [row.cells[0].text for row in found.table().rows] == ["0", "2"]
    assert [row.cells[0].text for row in found.strengths().rows] == ["1", "10"]
    assert "layers transferred" in str(found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_a_sweep_counts_from_the_output_side_below_a_head_that_is_new(held_out, quick, network, examples):
    """Reference by hand: of the layers 0, 2, 4 the head 4 is new; two from the output side are 0 and 2, one is 2."""
    found = ctl.sweep(
        network, network(5), examples(24), {"target": held_out["target"]}, quick, seeds=1, controls=False, strengths=[1]
    )
    layers = {run["variant"]: run["trained"] for run in found.runs if run["variant"].startswith("AnB from the output")}
    total = 8 * 12 + 12 + 12 * 12 + 12 + 12 * 3 + 3
    assert layers == {
        "AnB from the output side, 0 layers": total,
        "AnB from the output side, 1 layer": total - (12 * 12 + 12),
    }


def test_strengths_stop_where_a_decoupled_pull_overshoots(source, held_out, network, examples):
    """Reference by hand: rate times strength is 1 at most, so the largest at a rate of 0.01 is 100."""
    training = ctl.Training(epochs=1, lr=0.01, device="cpu")
    found = ctl.sweep(network, source, examples(24), held_out, training, seeds=1, numbers=[], controls=False)
    assert [entry["strength"] for entry in found.result["strengths"]] == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_a_recommendation_is_for_adapt_and_fit(source, network, examples):
    pytest.importorskip("sklearn")
    rng = torch.get_rng_state()
    found = ctl.recommend(network, source, examples(60, 1.0), source_data=examples(60))
    assert torch.equal(rng, torch.get_rng_state())
    assert found.evidence.examples == 60
    assert found.evidence.shift == "input"
    assert set(found.evidence.layers) == {"0", "2"}
    adaptation = ctl.adapt(network(), source, found.strategies)
    assert ctl.fit(adaptation, examples(60, 1.0), training=found.training, seed=0).steps > 0
    assert "LogME" in str(found)
    assert str(ctl.recommend(network, source, examples(60, 1.0), source_data=examples(60))) == str(found)
    with pytest.raises(ctl.SpecError, match="write: a spec names model and data"):
        found.write("recommended.yaml")


def test_a_recommendation_reads_dictionaries_with_a_forward_of_ones_own(source, network, examples):
    pytest.importorskip("sklearn")
    inputs, labels = examples(30)

    def forward(model, batch):
        return model(batch["sensor"])

    found = ctl.recommend(network, source, {"sensor": inputs, "labels": labels}, forward=forward, range_test=False)
    plain = ctl.recommend(network, source, (inputs, labels), range_test=False)
    assert found.evidence == plain.evidence


def test_a_recommendation_needs_source_and_data(source, network, examples):
    with pytest.raises(ctl.SpecError, match="train is missing"):
        ctl.recommend(network, source)
    with pytest.raises(ctl.SpecError, match="recommend: a spec names source, data and training itself"):
        ctl.recommend({"task": "speech"}, source)
    with pytest.raises(ctl.SpecError, match="one target; received a, b"):
        ctl.recommend(network, source, {"a": examples(), "b": examples()})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"shift": "noise"}, "shift must be one of .*input.*received 'noise'"),
        ({"usual_lr": -1}, "usual_lr must be a finite rate above 0; received -1"),
        ({"training": {"epochs": 1}}, "training must be a ctl.Training; received dict"),
    ],
)
def test_a_recommendation_refuses_wrong_options(option, message, source, network, examples):
    with pytest.raises(ctl.SpecError, match=message):
        ctl.recommend(network, source, examples(24), **option)


def test_lr_find_refuses_other_models_and_settings(source, network, examples):
    with pytest.raises(ctl.SpecError, match="adaptation must be what adapt returns; received Sequential"):
        ctl.lr_find(network(), examples(24))
    with pytest.raises(ctl.SpecError, match=r"training must be a ctl.Training; received dict"):
        ctl.lr_find(ctl.adapt(network(), source), examples(24), {"epochs": 1})


def test_lr_find_takes_the_optimizer_and_training_of_fit(source, network, examples):
    adaptation = ctl.adapt(network(), source, [ctl.L2SP(alpha=0.1)])
    before = copy.deepcopy(adaptation.model.state_dict())
    found = ctl.lr_find(adaptation, examples(24), ctl.Training(device="cpu"), optimizer=torch.optim.SGD, steps=30)
    assert found.best == found.suggestion
    assert f"{found.suggestion:.1e}" in str(found)
    assert all(torch.equal(before[name], value) for name, value in adaptation.model.state_dict().items())
    named = ctl.lr_find(adaptation, examples(24), ctl.Training(optimizer="adamw", device="cpu"), steps=30)
    assert named.losses != found.losses


def test_lr_find_uses_the_settings_of_a_recipe(source, network, examples):
    """A recipe's optimizer and batch size hold where no settings are given, as in fit."""
    adaptation = ctl.adapt(network(), source, ctl.recipe("vision"))
    given = ctl.lr_find(adaptation, examples(64), ctl.recipe("vision").training, steps=20)
    assert ctl.lr_find(adaptation, examples(64), steps=20) == given
