"""One contract over all strategies, and that it catches who breaks it."""

from __future__ import annotations

import copy
import doctest
import importlib
import random
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict
from torch import nn

import conservtl as ctl
import conservtl.testing
from conservtl.layers.extended import ExtendedModule, extend_module
from conservtl.methods import Order
from conservtl.plan import Extension, Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Choice
from conservtl.testing import check_strategy, instances, models, state_dicts, strategies

BUILT_IN = [
    ctl.L2SP(),
    ctl.L2SP(mode="decoupled", on="all", depth=(1, 0.1)),
    ctl.L2SP(alpha=100, normalize="per_parameter", anchors="bf16", anneal=ctl.Anneal(steps=5)),
    ctl.LPFT(epochs=2, probe=10),
    ctl.OutputConservation(),
    ctl.OutputConservation(weight=1.0),
    ctl.EntropyMinimisation(),
    ctl.LayerTransfer(layers=8),
    ctl.LayerTransfer(layers=0.4, freeze=False, rest="fresh"),
    ctl.LayerTransfer(layers=3, side="output", rest="fresh"),
    ctl.DiscriminativeLR(decay=0.8),
    ctl.DiscriminativeLR(lowest=1e-5, lr=1e-3, toward="input"),
    ctl.DiscriminativeLR(thirds=(0.01, 0.1, 1.0), decay_biases_and_norms=False),
    ctl.DiscriminativeLR(source=1e-5, fresh=1e-3),
    ctl.DiscriminativeLR(groups={"*.bias": 0.5}),
    ctl.GradualUnfreezing(),
    ctl.GradualUnfreezing(by="layer", at="input", epochs=2, scales=(1, 0.5)),
    ctl.GradualUnfreezing(phases=[ctl.Stage(train=["*.weight"], epochs=1), ctl.Stage(scale=0.5)]),
    ctl.FeatureExtraction(),
    ctl.FeatureExtraction(classifier="svm", C=0.5),
    ctl.FeatureExtraction(classifier="ncm", layers=("0", "15")),
    ctl.FeatureExtraction(layers=("3", "19")),
    ctl.NormAdaptation(),
    ctl.NormAdaptation(train="all", statistics="target"),
    ctl.NormAdaptation(train="all", statistics="instance"),
    ctl.NormAdaptation(train="nothing", statistics="source", head=True),
    ctl.LHUC(),
    ctl.LHUC(on=["0", "15"], freeze=False),
    ctl.LoRA(rank=1),
    ctl.LoRA(rank=2, alpha=3, on=["0", "15"]),
    ctl.InputTransform(),
    ctl.InputTransform(dim=-3, bias=False, freeze=False),
    ctl.FeatureConservation(),
    ctl.FeatureConservation(metric="ldifs", layers=("0", "3")),
    ctl.FeatureConservation(attention=True, layers=2),
    ctl.SpectralShrinkage(),
    ctl.SpectralShrinkage(k=2, layer="0"),
    ctl.FisherSP(),
    ctl.FisherSP(fisher="true", mode="decoupled", on="all", floor=0.1, clip=10),
    ctl.SurgicalFineTuning(),
    ctl.SurgicalFineTuning(block="best", trial_epochs=2),
    ctl.SurgicalFineTuning(block="?", head=True),
    ctl.AutoRGN(every=1),
    ctl.Projection(),
    ctl.Projection(radius="learn", steps=2),
    ctl.Projection(radius=1e-4, relative=False, by="row", norm="mars", on="all"),
    ctl.SelectiveDecay(strength=2.0, on="all"),
    ctl.L1SP(),
    ctl.GroupLassoSP(on="all", beta=None),
    ctl.Mixout(on="all"),
    ctl.WeightInterpolation(),
    ctl.WeightInterpolation(t=None, points=3, batch_norm="recompute"),
]


@pytest.mark.parametrize("strategy", BUILT_IN, ids=repr)
def test_built_in_strategies_keep_the_contract(strategy):
    check_strategy(strategy)


def test_every_kind_is_checked():
    listed = {cls for cls in vars(ctl).values() if isinstance(cls, type) and issubclass(cls, ctl.Strategy)}
    assert {type(strategy) for strategy in BUILT_IN} == listed - {ctl.Strategy}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_is_drawn_keeps_it_on_a_model_of_its_own(data):
    model, example = data.draw(models())
    before = copy.deepcopy(model.state_dict())
    for strategy in data.draw(strategies(model, example, max_size=1)):
        check_strategy(strategy, model=model, example=example)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Good(ctl.Strategy):
    kind: Literal["good"] = "good"
    strength: float = 0.5
    """How hard."""

    def apply(self, plan):
        rows = {row.name: {"scale": self.strength} for row in plan.rows if row.origin == "source"}
        return plan.choose(self.label, "rate", rows)


SEEN = []


class NoDescription(Good):
    kind: Literal["no_description"] = "no_description"
    bare: int = 0


class TakesAnything(Good):
    model_config = ConfigDict(extra="allow")
    kind: Literal["takes_anything"] = "takes_anything"


class Thawed(Good):
    model_config = ConfigDict(frozen=False)
    kind: Literal["thawed"] = "thawed"


class AnyKind(Good):
    kind: str


class NotLiteral(Good):
    kind: str = "not_literal"


class Forgets(Good):
    kind: Literal["forgets"] = "forgets"

    def apply(self, plan):
        return None


class Random(Good):
    kind: Literal["random"] = "random"

    def apply(self, plan):
        return plan.choose(self.label, "rate", {plan.rows[0].name: {"scale": random.random()}})


class DrawsTensors(Good):
    kind: Literal["draws_tensors"] = "draws_tensors"

    def apply(self, plan):
        torch.rand(1)
        return super().apply(plan)


class Mutates(Good):
    kind: Literal["mutates"] = "mutates"

    def apply(self, plan):
        plan.rows[0].chosen["pull"] = Choice(by="me", explicit=False)
        return plan


class DropsRows(Good):
    kind: Literal["drops_rows"] = "drops_rows"

    def apply(self, plan):
        return Plan(rows=plan.rows[:-1], phases=plan.phases)


class MovesRows(Good):
    kind: Literal["moves_rows"] = "moves_rows"

    def apply(self, plan):
        return Plan(rows=tuple(row.model_copy(update={"depth": 0.5}) for row in plan.rows))


class Remembers(Good):
    kind: Literal["remembers"] = "remembers"

    def apply(self, plan):
        SEEN.append(len(plan.rows))
        return plan if SEEN[0] == SEEN[-1] and len(set(SEEN)) == 1 else super().apply(plan)


class ReadsTooEarly(Good):
    """Freezes by whether a pull is there already, without declaring that it comes later."""

    kind: Literal["a"] = "a"
    order: ClassVar[Order] = Order.STRENGTH

    def apply(self, plan):
        return plan.choose(self.label, "frozen", {r.name: {"frozen": True} for r in plan.rows if r.pull})


class NotJSON(Good):
    kind: Literal["notjson"] = "notjson"
    strength: float = float("inf")
    """How hard."""


class Typo(Good):
    kind: Literal["typo"] = "typo"

    def apply(self, plan):
        return plan.choose(self.label, "pull", {plan.rows[0].name: {"pul": 1.0}})


def look_on(module, _, output):
    pass


def gain(module, _, output):
    return output * (1 + module.gain)


class Gain(Good):
    """Adds a factor on what the first module puts out."""

    kind: Literal["gain"] = "gain"
    extends: ClassVar[bool] = True
    start: ClassVar[float] = 0.0

    def apply(self, plan):
        return plan

    def extend(self, model, layers, example):
        model[0].register_parameter("gain", nn.Parameter(torch.full((1,), self.start)))
        model[0].register_forward_hook(gain)
        return {"0.gain": "a gain"}

    def retract(self, model):
        model[0]._forward_hooks.clear()
        model[0]._parameters.pop("gain", None)

    def merge(self, model):
        with torch.no_grad():
            for parameter in (model[0].weight, model[0].bias):
                parameter.mul_(1 + model[0].gain)
        self.retract(model)
        return True


class StartsElsewhere(Gain):
    kind: Literal["starts_elsewhere"] = "starts_elsewhere"
    start: ClassVar[float] = 1.0


class NamesNothing(Gain):
    kind: Literal["names_nothing"] = "names_nothing"

    def extend(self, model, layers, example):
        super().extend(model, layers, example)
        return {}


class HasNoEffect(Gain):
    kind: Literal["has_no_effect"] = "has_no_effect"

    def extend(self, model, layers, example):
        found = super().extend(model, layers, example)
        model[0]._forward_hooks.clear()
        model[0].register_forward_hook(look_on)
        return found


class LeavesItsHook(Gain):
    kind: Literal["leaves_its_hook"] = "leaves_its_hook"

    def retract(self, model):
        model[0]._parameters.pop("gain", None)

    def merge(self, model):
        return False


class MergesHalf(Gain):
    kind: Literal["merges_half"] = "merges_half"

    def merge(self, model):
        with torch.no_grad():
            model[0].weight.mul_(1 + model[0].gain)
        self.retract(model)
        return True


class SaysItMerged(Gain):
    kind: Literal["says_it_merged"] = "says_it_merged"

    def merge(self, model):
        return True


class OtherHead(nn.Linear):
    pass


class ReplacesSilently(Good):
    """Puts another head on the model, and declares nothing."""

    kind: Literal["replaces_silently"] = "replaces_silently"
    extends: ClassVar[bool] = True

    def apply(self, plan):
        return plan

    def extend(self, model, layers, example):
        model[-1] = OtherHead(3, len(model[-1].weight))
        return {}


class Louder(ExtendedModule):
    kind = "louder"
    settings = ("gain",)

    def forward(self, x):
        return super().forward(x) * self.gain


class LouderHead(Extension):
    kind: Literal["louder"] = "louder"
    gain: float
    hooked: bool = False

    def describe(self):
        return "a louder head"

    def extend(self, model, layers):
        if self.hooked:
            model[-1].register_forward_hook(look_on)
        if self.gain:
            extend_module(model[-1], Louder, gain=self.gain)


class Loud(Good):
    """Makes the last module louder, by an extension of the plan."""

    kind: Literal["loud"] = "loud"
    gain: ClassVar[float] = 2.0
    hooked: ClassVar[bool] = False

    def apply(self, plan):
        return plan.with_extension(LouderHead(by=self.label, gain=self.gain, hooked=self.hooked))


class NoLouder(Loud):
    kind: Literal["no_louder"] = "no_louder"
    gain: ClassVar[float] = 1.0


class ExtendsNothing(Loud):
    kind: Literal["extends_nothing"] = "extends_nothing"
    gain: ClassVar[float] = 0.0


class LoudWithAHook(Loud):
    kind: Literal["loud_with_a_hook"] = "loud_with_a_hook"
    hooked: ClassVar[bool] = True


class Distance(Penalty):
    """The distance to the source, whose gradient is 0 / 0 at the source itself."""

    kind: Literal["contract_distance"] = "contract_distance"
    power: float = 0.5

    def describe(self):
        return "the distance to the source"

    def value(self, moving):
        return sum((item.parameter - item.anchor).square().sum() for item in moving) ** self.power


class KeepsNear(Good):
    kind: Literal["keeps_near"] = "keeps_near"
    power: float = 0.5
    """Of the squared distance."""
    fresh: bool = False
    """Whether it is on fresh parameters too."""

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows if self.fresh or row.origin == "source")
        return plan.with_penalty(Distance(by=self.label, names=names, power=self.power))


# Specs of other tests must not meet these.
for name in [name for name, cls in ctl.Strategy.named.items() if cls.__module__ == __name__]:
    del ctl.Strategy.named[name]


class TestBroken:
    def test_a_good_one_passes(self):
        check_strategy(Good())
        check_strategy(Gain())
        check_strategy(Loud())

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            (
                NoDescription(),
                r"NoDescription: NoDescription\.bare has no description; .* or Field\(description=\.\.\.\)",
            ),
            (TakesAnything(), "takes fields that it does not have"),
            (Thawed(), "is not frozen"),
            (AnyKind(kind="x"), "kind must be a constant"),
            (NotLiteral(), "kind must be a constant, Literal"),
            (Forgets(), "must return a Plan; it returned NoneType"),
            (Random(), "another plan the second time"),
            (DrawsTensors(), "drew random numbers"),
            (Mutates(), "changed the plan it was given"),
            (DropsRows(), "added or dropped rows"),
            (MovesRows(), r"changed depth of row"),
            (Remembers(), "remembers"),
            (NotJSON(), "after JSON"),
            (StartsElsewhere(), "extend changed what the model computes"),
            (NamesNothing(), "must return what it added"),
            (HasNoEffect(), "no effect on what the model computes"),
            (LeavesItsHook(), "retract leaves something"),
            (MergesHalf(), "merge changed what the model computes"),
            (SaysItMerged(), "merge says True, but something is left"),
            (ReplacesSilently(), "extend added no parameters; if it replaces the head, declare that"),
            (NoLouder(), "its extension has no effect on what the model computes"),
            (ExtendsNothing(), "its extension extends no module"),
            (LoudWithAHook(), "something is left of its extension"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, ctl.Strategy) else "",
    )
    def test_says_how(self, strategy, message):
        SEEN.clear()
        with pytest.raises(AssertionError, match=message):
            check_strategy(strategy)

    def test_a_penalty_without_a_gradient_at_the_source(self):
        """The derivative of (d²)^½ is d / |d|; a power of 1 has one, 2d, and keeps the contract."""
        message = r"KeepsNear: '0\.weight' is not finite after training from w = w0\. Check the penalty's gradient at"
        with pytest.raises(AssertionError, match=message):
            check_strategy(KeepsNear())
        check_strategy(KeepsNear(power=1.0))

    def test_a_penalty_on_fresh_parameters_that_takes_anchors_for_granted(self):
        with pytest.raises(
            ctl.SpecError, match=r"KeepsNear: \['21\.weight', '21\.bias'\] have no anchor: they are fresh"
        ):
            check_strategy(KeepsNear(power=1.0, fresh=True))

    def test_a_field_that_no_row_has(self):
        with pytest.raises(ctl.PlanError, match=r"Typo chooses the pull of '0\.weight' as \{'pul': 1\.0\}"):
            check_strategy(Typo())

    def test_one_that_does_not_fit_the_model(self):
        with pytest.raises(ctl.SpecError, match="layers=99 asks for more"):
            check_strategy(ctl.LayerTransfer(layers=99))
        with pytest.raises(ctl.SpecError, match="layers=2 asks for more"):
            check_strategy(ctl.LayerTransfer(layers=2), model=nn.Linear(2, 2))

    def test_a_model_without_an_example_is_trained_on_random_gradients(self):
        check_strategy(ctl.L2SP(), model=nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))


class TestGenerators:
    def test_the_documented_example_runs(self):
        found = doctest.testmod(conservtl.testing)
        assert found.attempted >= 7
        assert not found.failed

    def test_every_module_of_it(self):
        for name in ("choices", "contract", "fields", "networks", "weights"):
            module = importlib.import_module(f"conservtl.testing.{name}")
            found = doctest.testmod(module)
            assert found.attempted
            assert not found.failed

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_fields_of_a_method_narrow_what_is_drawn(self, data):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        kinds = [ctl.Mixout, ctl.DiscriminativeLR, ctl.GradualUnfreezing, ctl.LayerTransfer]
        for strategy in data.draw(strategies(model, kinds=kinds)):
            assert type(strategy) in kinds
            if isinstance(strategy, ctl.Mixout):
                assert 0 <= strategy.p <= 0.9
            if isinstance(strategy, ctl.DiscriminativeLR) and strategy.groups is not None:
                assert set(strategy.groups) <= {"0.weight", "0.bias", "1.weight", "1.bias"}
            if isinstance(strategy, ctl.GradualUnfreezing) and strategy.phases is not None:
                assert all(0.1 <= stage.scale <= 1 for stage in strategy.phases)
            if isinstance(strategy, ctl.LayerTransfer) and isinstance(strategy.layers, tuple):
                assert set(strategy.layers) <= {"0", "1"}

    @pytest.mark.parametrize("cls", [type(strategy) for strategy in BUILT_IN], ids=lambda cls: cls.__name__)
    def test_every_built_in_strategy_can_be_drawn(self, cls):
        """And every alternative set of fields that its file names."""
        model, drawn = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)), []

        @settings(max_examples=40, deadline=None, database=None, derandomize=True)
        @given(strategies(model, torch.ones(2, 1, 1, 1), max_size=1, measured=True, kinds=[cls]))
        def draw(chosen):
            drawn.extend(chosen)

        draw()
        assert len({strategy.model_dump_json() for strategy in drawn}) > 2
        for fields in cls.test_fields:
            given_none = [name for name, value in fields.items() if value is None]
            assert any(all(getattr(one, name) is None for name in given_none) for one in drawn)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_models_leave_the_random_state_alone(self, data):
        state = torch.get_rng_state()
        model, example = data.draw(models())
        data.draw(state_dicts(model))
        assert torch.equal(state, torch.get_rng_state())
        assert model(example).shape == (4, 3)

    def test_optional_fields_are_drawn(self):
        """st.builds leaves them at their defaults."""
        drawn = []

        @settings(max_examples=200, deadline=None, database=None, derandomize=True)  # a fixed draw: chance fails no one
        @given(instances(ctl.L2SP))
        def collect(strategy):
            drawn.append(strategy)

        collect()
        assert {s.mode for s in drawn} == {"coupled", "decoupled"}
        assert {s.depth is None for s in drawn} == {True, False}
        assert len({s.alpha for s in drawn}) > 5
