"""``ctl.evaluate``: metrics before and after, against scores of the source and of the model computed by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 4, generator=GENERATOR)
TARGET = INPUTS, torch.randint(0, 3, (40,), generator=GENERATOR)
SOURCE = INPUTS * 2 + 1, torch.randint(0, 3, (40,), generator=GENERATOR)


def network(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, outputs))


def trained(*strategies, outputs=3, labels=TARGET[1], steps=3):
    """Return an adaptation in the middle of a loop, its optimizer, and the source with statistics of its own."""
    torch.manual_seed(1)
    source = network()
    source(torch.randn(64, 4) * 3 + 2)
    model = network(outputs)
    adaptation = ctl.adapt(model, copy.deepcopy(source), strategies)
    for measure in adaptation.plan.measures:
        assert measure.data == "target"
        adaptation.measure([TARGET])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5, momentum=0.9)
    model.train()
    for _ in range(steps):
        outputs = model(INPUTS)
        adaptation.loss(cross_entropy(outputs, labels), outputs, INPUTS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adaptation, optimizer, source.eval()


def by_hand(model, data):
    """Return logits, loss and accuracy of a model in eval mode."""
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(data[0])
    return logits, cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).float().mean().item()


STRATEGIES = {
    "plain": [],
    "pull": [ctl.L2SP(alpha=0.1)],
    "amplitudes": [ctl.LHUC()],
    "low rank": [ctl.LoRA(rank=2)],
    "statistics": [ctl.NormAdaptation()],
    "source model": [ctl.OutputConservation()],
    "replaced weights": [ctl.Mixout(p=0.5)],
}


@pytest.mark.parametrize("strategies", STRATEGIES.values(), ids=STRATEGIES)
def test_scores_of_the_source_and_of_the_present_weights(strategies):
    """Statistics of the batch norm are the source's before, whatever training has made of them."""
    adaptation, _, source = trained(*strategies)
    gains = ctl.evaluate(adaptation, {"target": TARGET, "source": SOURCE}, batch_size=16)
    for name, data in {"target": TARGET, "source": SOURCE}.items():
        for when, model in {"before": source, "after": adaptation.model}.items():
            _, loss, accuracy = by_hand(model, data)
            assert gains[when][name] == pytest.approx({"loss": loss, "accuracy": accuracy}, abs=1e-5)
    theirs, ours = by_hand(source, TARGET)[0].log_softmax(1), by_hand(adaptation.model, TARGET)[0].log_softmax(1)
    kl = (theirs.exp() * (theirs - ours)).sum(1).mean().item()
    same = (theirs.argmax(1) == ours.argmax(1)).float().mean().item()
    assert gains.agreement["after"] == pytest.approx({"agreement": same, "kl": kl}, abs=1e-5)


def test_everything_stays_as_it_is_in_the_middle_of_training():
    """A loop with an evaluation between two steps goes on to the bit as one without."""
    ends = []
    for evaluates in (False, True):
        adaptation, optimizer, _ = trained(ctl.L2SP(alpha=0.1))
        model = adaptation.model
        cross_entropy(model(INPUTS), TARGET[1]).backward()
        state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
        if evaluates:
            loader = DataLoader(TensorDataset(*TARGET), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
            own = loader.generator.get_state()
            ctl.evaluate(adaptation, {"target": loader})
            assert torch.equal(loader.generator.get_state(), own)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        optimizer.step()
        model(INPUTS)
        ends.append([*model.state_dict().values(), *optimizer.state_dict()["state"][0].values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_fresh_head_has_no_score_before():
    adaptation, _, _ = trained(outputs=2, labels=TARGET[1] % 2)
    data = TARGET[0], TARGET[1] % 2
    gains = ctl.evaluate(adaptation, {"target": data})
    assert gains.before == {"target": None}
    assert gains.agreement is None
    assert gains.after["target"]["accuracy"] == pytest.approx(by_hand(adaptation.model, data)[2])
    assert "target accuracy   fresh" in str(gains)
    assert "fresh: 4 starts from new values" in str(gains)
    with pytest.raises(ctl.SpecError, match=r"the head '4' is fresh\. Pass source=the source model"):
        ctl.evaluate(adaptation, {"target": data, "source": SOURCE})


@pytest.mark.parametrize("strategies", [[], [ctl.OutputConservation()]], ids=["given", "kept for a strategy"])
def test_the_sources_head_scores_the_source_where_the_models_is_fresh(strategies):
    adaptation, _, source = trained(*strategies, outputs=2, labels=TARGET[1] % 2)
    data = TARGET[0], TARGET[1] % 2
    gains = ctl.evaluate(adaptation, {"target": data, "source": SOURCE}, source=None if strategies else source)
    onto = copy.deepcopy(adaptation.model)
    onto[4] = source[4]
    assert gains.before["target"] is None
    assert gains.before["source"]["accuracy"] == pytest.approx(by_hand(source, SOURCE)[2])
    assert gains.after["source"]["loss"] == pytest.approx(by_hand(onto, SOURCE)[1], abs=1e-5)
    same = by_hand(onto, TARGET)[0].argmax(1) == by_hand(source, TARGET)[0].argmax(1)
    assert gains.agreement["after"]["agreement"] == pytest.approx(same.float().mean().item())
    assert gains.after["target"]["accuracy"] == pytest.approx(by_hand(adaptation.model, data)[2])


def test_rows_copied_by_label():
    """New rows have no starting values; the source's set has the numbers of the target's labels."""
    model, source = network(3), network(2)
    adaptation = ctl.adapt(model, source, labels=(["no", "yes", "stop"], ["yes", "no"]))
    data = SOURCE[0], SOURCE[1] % 2
    gains = ctl.evaluate(adaptation, {"source": data})
    assert gains.before == {"source": None}
    assert gains.after["source"]["accuracy"] == pytest.approx(by_hand(model, data)[2])
    with pytest.raises(ctl.SpecError, match="Leave source out"):
        ctl.evaluate(adaptation, {"source": data}, source=source)
    swapped = ctl.adapt(network(2), source, labels=(["no", "yes"], ["yes", "no"]))
    before = ctl.evaluate(swapped, {"target": data}).before["target"]
    assert before["accuracy"] == pytest.approx(by_hand(source, (data[0], 1 - data[1]))[2])


def test_metrics_of_ones_own_and_a_set_with_functions_of_its_own():
    """Regression: no answers to compare; a metric of one's own is a sum with its count."""
    model, source = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(source.weight, 2.0), nn.init.zeros_(source.bias)
    adaptation = ctl.adapt(model, source, [ctl.L2SP()])
    nn.init.constant_(model.weight, 3.0)
    inputs = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    gains = ctl.evaluate(
        adaptation,
        {"target": (inputs, 3 * inputs), "loud": ctl.Holdout((inputs, inputs), metrics=lambda y, _: {"top": y.max()})},
        loss=nn.MSELoss(),
        metrics=lambda y, batch: {"mae": ((y - batch[1]).abs().sum(), len(y)), "bias": (y - batch[1]).mean()},
        batch_size=2,
    )
    assert gains.before["target"] == pytest.approx({"loss": 7.5, "mae": 2.5, "bias": -2.5})
    assert gains.after["target"] == pytest.approx({"loss": 0.0, "mae": 0.0, "bias": 0.0})
    assert gains.after["loud"]["top"] == pytest.approx((6 + 12) / 2)
    assert gains.agreement is None
    assert str(gains).splitlines()[1].split() == ["target", "mean", "absolute", "error", "2.500", "0.000", "-2.500"]
    assert "loud top" in str(gains)


def test_the_card_takes_the_gains_as_they_are(tmp_path):
    adaptation, _, _ = trained()
    gains = ctl.evaluate(adaptation, {"target": TARGET, "source": SOURCE, "cleo": TARGET})
    folder = ctl.save(adaptation, tmp_path / "out", metrics=gains)
    report = json.loads((folder / "report.json").read_text())
    assert report["after"]["source"] == gains.after["source"]
    card = (folder / "README.md").read_text()
    assert f"answers as the source model | | {100 * gains.agreement['after']['agreement']:.1f} %" in card
    assert "| cleo | accuracy |" in card
    assert "<table" in gains._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", {"target": TARGET}), "evaluate takes the result of adapt"),
        ((None, TARGET), "sets must be named"),
        ((None, {}), "sets must be named"),
        ((None, {"target": TARGET}, "source.pt"), "source must be the source model"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    adaptation, sets, *source = arguments
    adaptation = trained(steps=0)[0] if adaptation is None else adaptation
    with pytest.raises(ctl.SpecError, match=message):
        ctl.evaluate(adaptation, sets, source=source[0] if source else None)


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr("conservtl.adaptation._finishing.sharded", lambda _: True)
    with pytest.raises(ctl.SpecError, match=r"'0\.weight' is sharded over processes"):
        ctl.evaluate(trained(steps=0)[0], {"target": TARGET})
