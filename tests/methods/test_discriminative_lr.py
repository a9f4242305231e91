"""Discriminative learning rates: each rule by numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.methods import apply_all
from conservtl.testing.choices import whole_plan


def deep(layers=5):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))


def adapted(*strategies, fresh=("4",), layers=5):
    model = deep(layers)
    return ctl.adapt(model, {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}, strategies, fresh=fresh)


def rates(*strategies, base=0.1, fresh=(), layers=5):
    plan = adapted(*strategies, fresh=fresh, layers=layers).plan
    return [plan[f"{i}.weight"].rate(base) for i in range(layers)]


class TestDecay:
    def test_falls_away_from_the_output(self):
        """timm's layer_decay: rate d^(distance from the output)."""
        assert rates(ctl.DiscriminativeLR(decay=0.5)) == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 0.1])

    def test_falls_away_from_the_input(self):
        found = rates(ctl.DiscriminativeLR(decay=0.5, toward="input"))
        assert found == pytest.approx([0.1, 0.05, 0.025, 0.0125, 0.00625])

    def test_absolute(self):
        found = rates(ctl.DiscriminativeLR(decay=0.5, lr=8e-3), base=123.0)
        assert found == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3, 8e-3])

    def test_fresh_layers_take_the_full_rate_wherever_they_stand(self):
        found = rates(ctl.DiscriminativeLR(decay=0.5), fresh=("1",))
        assert found == pytest.approx([0.00625, 0.1, 0.025, 0.05, 0.1])

    def test_one_layer(self):
        assert rates(ctl.DiscriminativeLR(decay=0.5), layers=1) == [0.1]
        assert rates(ctl.DiscriminativeLR(lowest=0.5), layers=1) == [0.1]

    def test_ulmfit(self):
        found = rates(ctl.DiscriminativeLR(decay=1 / 2.6))
        assert found[3] / found[4] == pytest.approx(1 / 2.6)

    def test_underflow_is_refused(self):
        with pytest.raises(ctl.PlanError, match=r"DiscriminativeLR gives '0\.weight' scale=0\.0"):
            rates(ctl.DiscriminativeLR(decay=1e-100))


class TestLowest:
    def test_geometric_as_fastais_slice(self):
        """slice(1e-6, 1e-2) over five groups."""
        assert rates(ctl.DiscriminativeLR(lowest=1e-6, lr=1e-2)) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
        assert rates(ctl.DiscriminativeLR(lowest=1e-4)) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])

    def test_toward_the_input(self):
        found = rates(ctl.DiscriminativeLR(lowest=1e-4, toward="input"))
        assert found == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4, 1e-5])

    @pytest.mark.parametrize("fields", [{"lowest": 2.0}, {"lowest": 1e-2, "lr": 1e-3}])
    def test_not_above_the_full_rate(self, fields):
        with pytest.raises(ValidationError, match="must not exceed the full rate"):
            ctl.DiscriminativeLR(**fields)


class TestThirds:
    def test_halves_of_the_body_then_the_head(self):
        assert rates(ctl.DiscriminativeLR(thirds=(0.01, 0.1, 1))) == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2, 0.1])

    def test_an_odd_body_and_what_is_fresh(self):
        found = rates(ctl.DiscriminativeLR(thirds=(0.01, 0.1, 1), lr=1.0), fresh=("1", "4"))
        assert found == pytest.approx([0.01, 1, 0.01, 0.1, 1])


class TestGroups:
    def test_by_glob_the_others_full(self):
        assert rates(ctl.DiscriminativeLR(groups={"[01].*": 0.1, "2": 0.5})) == pytest.approx(
            [0.01, 0.01, 0.05, 0.1, 0.1]
        )

    def test_absolute(self):
        found = rates(ctl.DiscriminativeLR(groups={"0": 1e-5}, lr=1e-3))
        assert found == pytest.approx([1e-5, 1e-3, 1e-3, 1e-3, 1e-3])

    def test_a_glob_that_matches_nothing(self):
        """skorch and timm accept it in silence."""
        with pytest.raises(ctl.SelectorError, match=r"'layr\.\*'"):
            rates(ctl.DiscriminativeLR(groups={"layr.*": 0.1}))

    def test_two_globs_that_match_the_same(self):
        with pytest.raises(ctl.SelectorError, match=r"'0\.weight' is matched by '\*\.weight' and by another"):
            rates(ctl.DiscriminativeLR(groups={"0": 0.1, "*.weight": 0.5}))

    def test_named_wins_over_everything_in_either_order(self):
        pair = [ctl.DiscriminativeLR(decay=0.5), ctl.DiscriminativeLR(groups={"0": 3.0}, lr=1.0)]
        with pytest.raises(ctl.PlanError, match="DiscriminativeLR and DiscriminativeLR both choose the rate"):
            rates(*pair)  # lr gives the others a rate too
        pair[1] = ctl.DiscriminativeLR(groups={"0": 3.0})
        assert rates(*pair) == rates(*pair[::-1]) == pytest.approx([0.3, 0.0125, 0.025, 0.05, 0.1])

    def test_named_wins_over_fresh(self):
        found = rates(ctl.DiscriminativeLR(groups={"4": 0.5}, fresh=7.0), fresh=("3", "4"))
        assert found == pytest.approx([0.1, 0.1, 0.1, 7.0, 0.05])


class TestByOrigin:
    def test_source_and_fresh(self):
        found = rates(ctl.DiscriminativeLR(source=1e-5, fresh=1e-3), fresh=("4",))
        assert found == [1e-5, 1e-5, 1e-5, 1e-5, 1e-3]

    def test_one_of_them(self):
        assert rates(ctl.DiscriminativeLR(source=1e-5), fresh=("4",)) == [1e-5] * 4 + [0.1]
        assert rates(ctl.DiscriminativeLR(fresh=1e-3), fresh=("4",)) == [0.1] * 4 + [1e-3]

    def test_fresh_combines_with_another_rule(self):
        found = rates(ctl.DiscriminativeLR(decay=0.5, fresh=7.0), fresh=("4",))
        assert found == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 7.0])


class TestWeightDecay:
    def test_off_biases_and_norms(self):
        adaptation = adapted(ctl.DiscriminativeLR(decay=0.5, decay_biases_and_norms=False))
        optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.2)
        decay = {n: group["weight_decay"] for group in optimizer.param_groups for n in group["param_names"]}
        assert decay == {name: 0.2 if name.endswith("weight") else 0.0 for name in decay}
        assert len(decay) == 10

    def test_without_a_rule_of_rates(self):
        """As README has it: rates stay the optimizer's."""
        strategy = ctl.DiscriminativeLR(decay_biases_and_norms=True)
        assert rates(strategy) == [0.1] * 5
        optimizer = adapted(strategy).optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.2)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2}

    def test_two_that_agree(self):
        both = [
            ctl.DiscriminativeLR(decay=0.5, decay_biases_and_norms=False),
            ctl.DiscriminativeLR(groups={"0": 0.1}, decay_biases_and_norms=False),
        ]
        assert not apply_all(whole_plan(deep()), both)["0.bias"].weight_decay


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lr": 1e-3},
        {"lr": 1e-3, "decay_biases_and_norms": True},
        {"decay": 0.5, "lowest": 0.1},
        {"decay": 0.5, "source": 0.1},
        {"decay": 0.0},
        {"decay": 1.1},
        {"lowest": 0.0},
        {"thirds": (1, 2)},
        {"groups": {"a": -1}},
        {"source": float("inf")},
    ],
)
def test_exactly_one_rule_within_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.DiscriminativeLR(**fields)
