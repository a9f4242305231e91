"""Searches: a run with a candidate that was found equals a run with that candidate given."""

from __future__ import annotations

import copy
import json
from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.plan import Plan, Search

TRAINING = ctl.Training(epochs=10, batch_size=16, lr=0.05)


def problem():
    """A source model, and data with inputs of the other sign: only the first layer can correct that."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 3))
    x = torch.randn(120, 4, generator=generator)
    labels = (3 * source(x)).argmax(-1)
    moved = -x
    return source, (moved[:80], labels[:80]), (moved[80:], labels[80:])


def adapted(source, **fields):
    return ctl.adapt(copy.deepcopy(source), source, [ctl.SurgicalFineTuning(**fields)])


def test_it_finds_the_block_that_mends_the_shift():
    source, train, valid = problem()
    adaptation = adapted(source, block="best", trial_epochs=10)
    scores = ctl.best_block(adaptation, train, {"target": valid}, TRAINING)
    assert list(scores) == ["0", "2", "4"]
    assert max(scores, key=scores.get) == "0"
    assert adaptation.plan.facts == {"surgical_block": "0"}
    assert {name for name, p in adaptation.model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias"}


def test_trials_leave_the_model_and_the_generators_as_they_were():
    source, train, valid = problem()
    adaptation = adapted(source, block="best")
    state = torch.get_rng_state()
    ctl.best_block(adaptation, train, {"target": valid}, TRAINING)
    assert torch.equal(state, torch.get_rng_state())
    theirs = source.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adaptation.model.state_dict().items())


def test_fit_finds_it_and_then_trains_as_if_it_had_been_named():
    source, train, valid = problem()
    found, named = adapted(source, block="best", trial_epochs=2), adapted(source, block=0)
    for adaptation in (found, named):
        ctl.fit(adaptation, train, {"target": valid}, TRAINING, seed=3)
    assert found.plan.facts == {"surgical_block": "0"}
    for a, b in zip(found.model.parameters(), named.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loader_with_a_generator_of_its_own_is_put_back():
    source, train, valid = problem()

    def loader():
        generator = torch.Generator().manual_seed(5)
        data = torch.utils.data.TensorDataset(*train)
        return torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=generator)

    found, named = adapted(source, block="best", candidates=["0", "2"]), adapted(source, block=0)
    for adaptation in (found, named):
        ctl.fit(adaptation, loader(), {"target": valid}, TRAINING, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), named.model.parameters(), strict=True))


def test_a_resumed_run_does_not_choose_again(tmp_path, interrupting):
    source, train, valid = problem()
    whole, part, again = (adapted(source, block="best", trial_epochs=1) for _ in range(3))
    ctl.fit(whole, train, {"target": valid}, TRAINING, seed=1)
    with pytest.raises(KeyboardInterrupt):  # in the run's first epochs, after 3 trials of 6 calls
        ctl.fit(part, train, {"target": valid}, TRAINING, seed=1, out=tmp_path, forward=interrupting(3 * 6 + 13))
    calls = []

    def forward(model, batch):
        calls.append(model.training)
        return model(batch[0])

    ctl.fit(again, train, {"target": valid}, TRAINING, seed=1, out=tmp_path, resume=True, forward=forward)
    assert again.plan == whole.plan
    assert sum(calls) < 50
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_without_a_validation_part_it_is_refused_before_training():
    source, train, _ = problem()
    adaptation = adapted(source, block="best")
    with pytest.raises(ctl.SpecError, match=r"SurgicalFineTuning chooses on a validation part, but there is none"):
        ctl.fit(adaptation, train, training=TRAINING)
    with pytest.raises(ctl.SpecError, match="SurgicalFineTuning chooses on a validation part"):
        ctl.best_block(adaptation, train, {}, TRAINING)


def test_where_nobody_asks_nothing_is_tried():
    source, train, valid = problem()
    assert ctl.best_block(adapted(source, block=1), train, {"target": valid}) == {}


class BestScale(Search):
    """The factor on all rates that does best on the validation part."""

    kind: Literal["test_best_scale"] = "test_best_scale"
    scales: tuple[float, ...]

    def describe(self) -> str:
        return f"the best of the rates × {self.scales}"

    def trials(self):
        return {f"{scale:g}": {"scale": f"{scale:g}"} for scale in self.scales}


class Cautious(BestScale):
    """The smallest factor with a score within 0.1 of the best."""

    kind: Literal["test_cautious_scale"] = "test_cautious_scale"

    def decide(self, scores):
        return {"scale": min((name for name in scores if scores[name] > max(scores.values()) - 0.1), key=float)}


class SearchedScale(ctl.Strategy):
    """Train everything with one factor on the rates, given or searched for."""

    kind: Literal["test_searched_scale"] = "test_searched_scale"
    scales: tuple[float, ...]
    """Factors to try."""
    cautious: bool = False
    """Whether the smallest good factor is chosen."""

    def apply(self, plan: Plan) -> Plan:
        if len(self.scales) > 1 and "scale" not in plan.facts:
            search = Cautious if self.cautious else BestScale
            return plan.with_search(search(by=self.label, scales=self.scales, epochs=4))
        scale = float(plan.facts.get("scale", self.scales[0]))
        return plan.choose(self.label, "rate", {row.name: {"scale": scale} for row in plan.rows}, explicit=False)


class Undecided(SearchedScale):
    """A strategy that forgets to read the fact."""

    kind: Literal["test_undecided"] = "test_undecided"

    def apply(self, plan: Plan) -> Plan:
        return plan.with_search(BestScale(by=self.label, scales=self.scales))


def scaled(source, *strategies):
    return ctl.adapt(copy.deepcopy(source), source, strategies)


def test_a_search_of_a_users_own_in_a_loop_by_hand():
    source, train, valid = problem()
    adaptation = scaled(source, SearchedScale(scales=(1e-6, 1.0)))
    assert "before  SearchedScale: the best of the rates × (1e-06, 1.0)" in str(adaptation.plan)
    with pytest.raises(ctl.SpecError, match=r"Call conservtl\.best_block\(adaptation, train, valid\)"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1)
    scores = ctl.best_block(adaptation, train, {"target": valid}, TRAINING)
    assert list(scores) == ["1e-06", "1"]
    assert scores["1"] > scores["1e-06"]
    assert adaptation.plan.facts == {"scale": "1"}
    assert {group["lr"] for group in adaptation.optimizer(torch.optim.SGD, lr=0.1).param_groups} == {0.1}


def test_a_search_of_a_users_own_in_fit():
    source, train, valid = problem()
    found, named = scaled(source, SearchedScale(scales=(1e-6, 1.0))), scaled(source, SearchedScale(scales=(1.0,)))
    for adaptation in (found, named):
        ctl.fit(adaptation, train, {"target": valid}, TRAINING, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), named.model.parameters(), strict=True))


def test_a_search_decides_on_the_scores():
    """By its own rule, which need not take the best."""
    source, train, valid = problem()
    adaptation = scaled(source, SearchedScale(scales=(1.0, 0.9, 1e-6), cautious=True))
    scores = ctl.best_block(adaptation, train, {"target": valid}, TRAINING)
    least = min((name for name in scores if scores[name] > max(scores.values()) - 0.1), key=float)
    assert adaptation.plan.facts == {"scale": least}
    assert least == "0.9"


def test_two_searches_are_both_decided():
    source, train, valid = problem()
    adaptation = scaled(
        source, SearchedScale(scales=(1e-6, 1.0)), ctl.SurgicalFineTuning(block="best", candidates=["0", "4"])
    )
    scores = ctl.best_block(adaptation, train, {"target": valid}, TRAINING)
    assert list(scores) == ["0", "4", "1e-06", "1"]
    assert adaptation.plan.facts == {"surgical_block": "0", "scale": "1"}


def test_a_search_that_its_strategy_never_ends_is_refused():
    source, train, valid = problem()
    with pytest.raises(ctl.PlanError, match=r"Undecided still searches for 'test_best_scale' with the facts"):
        ctl.fit(scaled(source, Undecided(scales=(0.1, 1.0))), train, {"target": valid}, TRAINING)


def test_a_search_survives_json():
    source, *_ = problem()
    plan = adapted(source, block="best", trial_epochs=2).plan
    assert Plan(**json.loads(plan.model_dump_json())) == plan
    assert plan.searches[0].trials()["2"] == {"surgical_block": "2"}


def test_a_search_among_the_measurements_of_an_older_plan_is_read():
    source, *_ = problem()
    plan = adapted(source, block="best", trial_epochs=2).plan
    fields = json.loads(plan.model_dump_json())
    (search,) = fields.pop("searches")
    assert Plan(**{**fields, "measures": [{**search, "data": "target"}]}) == plan
