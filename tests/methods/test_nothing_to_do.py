"""Decisions in a step without parameters that move, on modules that they cannot scale, or without what they need."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods.auto_rgn import AutoRGNUpdate
from conservtl.methods.feature_conservation.attention import _first_changed, _Occluded
from conservtl.methods.fisher_sp import FisherMeasure
from conservtl.methods.input_transform.affine import _close, _transformed, plain_transform
from conservtl.methods.lhuc.hidden_units import unit_count
from conservtl.methods.projection import LearnedProjection
from conservtl.methods.selective_decay import SelectiveDecayUpdate
from conservtl.methods.weight_interpolation import BestInterpolation

STILL = SimpleNamespace(moving=())


def decision(cls, strategies):
    """The decision of this class in a plan."""
    plan = ctl.adapt(nn.Linear(3, 2), nn.Linear(3, 2), strategies).plan
    decisions = (*plan.updates, *plan.measures, *plan.after)
    return next(one for one in decisions if isinstance(one, cls))


def test_a_step_in_which_nothing_moves_leaves_the_state_alone():
    state = {"sums": torch.ones(1)}
    decision(AutoRGNUpdate, [ctl.AutoRGN()]).gradients(STILL, state)
    assert state == {"sums": torch.ones(1)}
    decay = decision(SelectiveDecayUpdate, [ctl.SelectiveDecay()])
    decay.gradients(STILL, state)
    decay.after(STILL, state)
    assert state == {}


def test_a_source_model_without_the_parameters():
    measure = decision(FisherMeasure, [ctl.FisherSP()])
    with pytest.raises(ctl.SourceError, match=r"the source model has no parameter 'weight'\. Set data='target'"):
        measure.compute(SimpleNamespace(parameters={}))


def test_a_choice_of_points_needs_a_score():
    after = decision(BestInterpolation, [ctl.WeightInterpolation(t=None)])
    with pytest.raises(ctl.SpecError, match="chooses on a validation part: pass score"):
        after.finish(SimpleNamespace(score=None))


def test_no_parameters_have_no_radii():
    after = decision(LearnedProjection, [ctl.Projection(radius="learn")])
    ending = SimpleNamespace(valid=[1], objective=print, model=nn.Linear(3, 2), start={})
    assert after.model_copy(update={"names": ()}).finish(ending) == {"radii": {}}


@pytest.mark.parametrize(
    ("module", "count"), [(nn.LayerNorm(4), 4), (nn.LayerNorm((3, 4)), None), (nn.ReLU(), None), (nn.Linear(3, 5), 5)]
)
def test_units_that_an_amplitude_can_scale(module, count):
    assert unit_count(module) == count


def test_the_first_tensor_of_a_layers_output_is_changed():
    one = torch.ones(1)
    assert _first_changed([one, one], lambda tensor: tensor + 1) == [one + 1, one + 1]
    assert _first_changed((one, "state"), lambda tensor: tensor + 1) == (one + 1, "state")


def test_a_layer_that_the_source_model_does_not_have():
    with pytest.raises(ctl.SpecError, match="layer 'a' has no module in the source model"):
        _Occluded(SimpleNamespace(modules={}), "a")


def test_a_model_without_a_transform_is_plain():
    model = nn.Linear(3, 2)
    assert plain_transform(model) is model


def test_the_first_tensor_of_the_inputs_is_transformed():
    model = nn.Module()
    model.input_transform = lambda tensor: 2 * tensor
    one = torch.ones(1)
    assert _transformed(model, ("id", one), {}) == (("id", 2 * one), {})
    assert _transformed(model, ("id",), {"size": 3, "x": one}) == (("id",), {"size": 3, "x": 2 * one})
    with pytest.raises(ctl.SpecError, match="called without a tensor"):
        _transformed(model, ("id",), {"size": 3})


@pytest.mark.parametrize(
    ("one", "other", "close"),
    [([1.0], None, False), ([], [], False), ([1.0], [1.0, 1.0], False), ([1.0], [1.1], False), ([1.0], [1.0], True)],
)
def test_outputs_that_are_equal_to_rounding(one, other, close):
    assert _close([torch.tensor(x) for x in one], other and [torch.tensor(x) for x in other]) is close
