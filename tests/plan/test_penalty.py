"""Penalties in the plan: what they may name and read, how they print, and plans written before there were any."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods.l2_sp import L2Penalty
from conservtl.plan import Moving, Penalty, Plan
from conservtl.plan.upgrade import upgrade


class Cubic(Penalty):
    """The sum of |w - w0| cubed."""

    kind: Literal["plan_cubic"] = "plan_cubic"
    strength_of_it: float = 1.0

    def describe(self):
        return f"cubic, {self.strength_of_it:g}"

    def value(self, moving):
        return self.strength_of_it * sum((item.parameter - item.anchor).abs().pow(3).sum() for item in moving)


class Again(L2Penalty):
    """A second pull by the numbers in the rows."""

    kind: Literal["plan_again"] = "plan_again"


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes))


def plan(*strategies, classes=2):
    return ctl.adapt(network(classes), network(), strategies).plan


CUBIC = Cubic(by="Mine", names=("0.weight", "0.bias"))


class TestInvariants:
    def test_a_name_that_the_plan_does_not_have(self):
        with pytest.raises(ctl.PlanError, match=r"plan: Mine acts on \['9\.weight'\], which the plan does not have"):
            plan().with_penalty(Cubic(by="Mine", names=("9.weight",)))

    def test_two_of_one_name(self):
        with pytest.raises(ctl.PlanError, match="Yours and Mine both decide 'plan_cubic'"):
            plan().with_penalty(CUBIC).with_penalty(CUBIC.model_copy(update={"by": "Yours"}))

    def test_one_takes_the_place_of_the_one_of_its_name(self):
        other = CUBIC.model_copy(update={"strength_of_it": 2.0})
        assert plan().with_penalty(CUBIC).with_penalty(other, replace=True).penalties == (other,)

    def test_a_measurement_that_nobody_makes(self):
        with pytest.raises(ctl.PlanError, match=r"plan: Mine reads \['fisher'\], which no measure gives"):
            plan().with_penalty(CUBIC.model_copy(update={"reads": ("fisher",)}))

    def test_two_on_one_column_of_a_row(self):
        """Both would pull by the same number."""
        again = L2Penalty(by="Mine", names=("0.weight",))
        with pytest.raises(ctl.PlanError, match=r"Mine and L2SP both choose the pull of '0\.weight' \(layer '0'\)"):
            plan(ctl.L2SP()).with_penalty(Again(by="Mine", names=("0.weight",)))
        with pytest.raises(ctl.PlanError, match="Mine and L2SP both decide 'l2_sp'"):
            plan(ctl.L2SP()).with_penalty(again)

    def test_one_beside_a_pull_is_allowed(self):
        """Its strength is its own."""
        assert len(plan(ctl.L2SP()).with_penalty(CUBIC).penalties) == 2

    def test_its_gradient_is_that_of_its_value_unless_it_says_otherwise(self):
        row = plan()["0.weight"]
        w, w0 = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
        (gradient,) = Cubic(by="", names=()).gradient([Moving(row, w, w0, {})])
        torch.testing.assert_close(gradient, torch.tensor([3 * 0.25, -3 * 9.0]))
        assert not w.requires_grad


class TestPrinted:
    def test_one_with_a_strength_of_its_own_stands_beside_the_table(self):
        assert "penalty  Mine: cubic, 1" in str(plan().with_penalty(CUBIC)).splitlines()

    def test_one_whose_strength_is_a_column_stands_in_the_table(self):
        text = str(plan(ctl.L2SP(alpha=0.5, beta=0.25, mode="decoupled"), classes=3))
        assert "0.5 decoupled" in text
        assert "0.25 decoupled" in text
        assert "penalty" not in text

    def test_only_the_pull_is_weighed(self):
        text = str(plan(ctl.FisherSP(alpha=0.5, beta=0.25, mode="decoupled"), classes=3))
        assert "0.5 × fisher decoupled" in text
        assert "0.25 decoupled" in text


class TestFiles:
    @pytest.mark.parametrize(
        "strategies",
        [
            [ctl.L2SP(anneal=ctl.Anneal(steps=3), anchors="cpu", mode="decoupled")],
            [ctl.FisherSP(), ctl.Mixout()],
            [ctl.L1SP(), ctl.L2SP(mode="decoupled")],
        ],
        ids=str,
    )
    def test_both_ways_by_kind(self, strategies):
        drawn = plan(*strategies, classes=3).with_penalty(CUBIC)
        assert Plan(**drawn.model_dump(mode="json")) == drawn
        assert Plan.model_validate_json(drawn.model_dump_json()) == drawn
        assert list(map(type, Plan(**drawn.model_dump(mode="json")).penalties)) == list(map(type, drawn.penalties))

    def test_a_kind_that_is_not_known_is_named(self):
        fields = plan().with_penalty(CUBIC).model_dump(mode="json")
        fields["penalties"][0]["kind"] = "elsewhere"
        with pytest.raises(ValueError, match="no Penalty of kind 'elsewhere': import its class first"):
            Plan(**fields)


OLD = {"mode": "coupled", "importance": None, "anchor": "fp32", "anneal": None}


class TestUpgrade:
    """Plans of 0.1.0, whose rows had four columns that are fields of a penalty now."""

    def old(self, strategies, held, *, classes=3, fresh=None):
        """A plan's fields as 0.1.0 wrote them: ``held`` on pulled rows, ``fresh`` on decayed ones."""
        fields = plan(*strategies, classes=classes).model_dump(mode="json")
        for row in fields["rows"]:
            row.update(OLD)
            if row["pull"] is not None:
                row.update(held)
            if row["decay"] is not None:
                row.update(fresh or {})
        del fields["penalties"]
        return fields

    @pytest.mark.parametrize(
        ("strategies", "held", "fresh"),
        [
            ([ctl.L2SP()], {}, {}),
            ([ctl.L2SP(mode="decoupled", on="all")], {"mode": "decoupled"}, {"mode": "decoupled"}),
            ([ctl.L2SP(anchors="bf16")], {"anchor": "bf16"}, {}),
            (
                [ctl.L2SP(anneal=ctl.Anneal(steps=4))],
                {"anneal": {"steps": 4, "start": 1.0, "end": 0.0, "shape": "linear", "rate": 0.05}},
                {},
            ),
            ([ctl.FisherSP()], {"importance": "fisher"}, {}),
            ([ctl.L1SP()], {}, {}),
            ([ctl.L1SP(on="all"), ctl.L2SP()], {}, {}),
            ([ctl.GroupLassoSP(), ctl.FisherSP()], {"importance": "fisher"}, {}),
            ([ctl.DiscriminativeLR(decay=0.5)], {}, {}),
        ],
        ids=str,
    )
    def test_means_what_the_strategies_mean_now(self, strategies, held, fresh):
        assert Plan(**self.old(strategies, held, fresh=fresh)) == plan(*strategies, classes=3)

    def test_rows_without_an_author_are_read(self):
        """As they stand in files that were cut short."""
        fields = self.old([ctl.L2SP()], {})
        for row in fields["rows"]:
            del row["chosen"]
        assert {penalty.by for penalty in Plan(**fields).penalties} == {"L2SP"}

    def test_changes_nothing_that_it_is_given(self):
        fields = self.old([ctl.L2SP()], {})
        before = copy.deepcopy(fields)
        upgrade(fields)
        assert fields == before

    def test_fields_of_today_stay(self):
        fields = plan(ctl.L2SP()).model_dump(mode="json")
        assert upgrade(fields) == fields

    def test_a_state_dict_of_before_is_loaded(self):
        ours, theirs = (ctl.adapt(network(3), network(), [ctl.L2SP(mode="decoupled")]) for _ in range(2))
        state = ours.state_dict()
        state["plan"] = self.old([ctl.L2SP(mode="decoupled")], {"mode": "decoupled"}, fresh={"mode": "decoupled"})
        theirs.load_state_dict(state)
        with pytest.raises(ctl.PlanError, match="this state belongs to another plan: its penalties differs"):
            ctl.adapt(network(3), network(), [ctl.L2SP(mode="decoupled", anchors="cpu")]).load_state_dict(state)


def test_it_is_among_the_decisions():
    assert CUBIC in plan(ctl.L2SP(), ctl.Mixout()).with_penalty(CUBIC).decisions


def test_covered_names_the_strategy_of_each_parameter():
    covered = plan(ctl.L2SP(on="all"), classes=3).with_penalty(CUBIC).covered
    assert covered["0.weight"] == "L2SP"
    assert set(covered) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert dict(plan().covered) == {}


def test_a_strength_is_the_largest_of_those_that_act():
    drawn = plan(ctl.L2SP(alpha=0.5, beta=0.25, mode="decoupled"), classes=3).with_penalty(CUBIC)
    assert drawn.strength_of("0.weight", "decoupled") == 0.5
    assert drawn.strength_of("2.weight", "decoupled") == 0.25
    assert drawn.strength_of("0.weight", "coupled") == 0.0
    assert drawn.strength_of("0.bias", "decoupled") == 0.0


class TestElasticNet:
    """L1SP beside a pull: both give fresh parameters a beta, and equal ones agree."""

    @pytest.mark.parametrize("first", [ctl.L1SP(), ctl.GroupLassoSP()], ids=lambda one: one.label)
    @pytest.mark.parametrize("mode", ["coupled", "decoupled"])
    @pytest.mark.parametrize("pull", [ctl.L2SP, ctl.FisherSP])
    def test_equal_betas_agree_whatever_the_mode(self, first, mode, pull):
        """One penalty acts on what is fresh, in the mode that was asked for."""
        second = pull(mode=mode)
        one, other = plan(first, second, classes=3), plan(second, first, classes=3)
        assert one == other
        decays = [penalty for penalty in one.penalties if penalty.column == "decay"]
        assert [(penalty.mode, penalty.names) for penalty in decays] == [(mode, ("2.weight",))]
        assert one["2.weight"].decay == 0.01

    @pytest.mark.parametrize("first", [ctl.L1SP(beta=0.02), ctl.GroupLassoSP(beta=0.02)], ids=lambda one: one.label)
    @pytest.mark.parametrize("mode", ["coupled", "decoupled"])
    def test_unequal_betas_are_refused_by_name(self, first, mode):
        for strategies in ([first, ctl.L2SP(mode=mode)], [ctl.L2SP(mode=mode), first]):
            with pytest.raises(ctl.PlanError, match=f"L2SP and {first.label} both choose the decay of '2.weight'"):
                plan(*strategies, classes=3)

    def test_both_cover_what_either_does(self):
        (decay,) = (p for p in plan(ctl.L1SP(on="all"), ctl.L2SP(), classes=3).penalties if p.column == "decay")
        assert decay.names == ("2.weight", "2.bias")
