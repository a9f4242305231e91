"""Starting values: which are kept, what is read from the model instead, and that both say the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.anchors import differs
from conservtl.weights.path import WeightPath

LAYER = 256 * 256 + 256


def network():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(7)))


def adapted(*strategies, model=None):
    source = network()
    return ctl.adapt(network() if model is None else model, source, strategies), source


def kept(adaptation):
    return sum(tensor.numel() for tensor in adaptation.bound.anchors.parameters.values())


def move(adaptation):
    """Change everything that is trained now."""
    with torch.no_grad():
        for name, parameter in adaptation.model.named_parameters():
            if name not in adaptation.frozen:
                parameter.add_(0.5)


@pytest.mark.parametrize(
    ("strategies", "layers"),
    [
        ([], 7),
        ([ctl.LayerTransfer(layers=6)], 1),
        ([ctl.LayerTransfer(layers=6), ctl.L2SP(on="all")], 1),
        ([ctl.LayerTransfer(layers=6, freeze=False)], 7),
        ([ctl.GradualUnfreezing()], 7),
        ([ctl.LayerTransfer(layers=2), ctl.GradualUnfreezing(by="layer")], 5),
        ([ctl.SurgicalFineTuning(block="last")], 1),
        ([ctl.LayerTransfer(layers=6, rest="fresh")], 0),
    ],
    ids=str,
)
def test_what_is_frozen_throughout_is_not_kept(strategies, layers):
    """What a phase freezes for a while is, and what is fresh never."""
    adaptation, _ = adapted(*strategies)
    assert kept(adaptation) == layers * LAYER
    assert sum(t.numel() for t in adaptation.state_dict()["start"].values()) == layers * LAYER


def test_the_start_is_whole_all_the_same():
    """Of frozen parameters it is the model's own value; what is returned is a copy."""
    adaptation, source = adapted(ctl.LayerTransfer(layers=6), ctl.L2SP())
    move(adaptation)
    start = adaptation.start
    assert start.keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(start[name], value)
        start[name].zero_()
    assert torch.equal(adaptation.model[0].weight, source[0].weight)


def test_drift_of_a_frozen_layer_is_zero_exactly_and_counts_in_its_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source = copy.deepcopy(model)
    adaptation = ctl.adapt(model, source, [ctl.LayerTransfer(layers=1)])
    move(adaptation)
    drift = adaptation.drift()
    assert drift["0"] == 0.0
    size = sum(p.square().sum() for p in source[1].parameters())
    assert drift["1"] == pytest.approx((6 * 0.25 / size.item()) ** 0.5)


def test_a_layer_frozen_in_part_drifts_by_what_moved_over_all_of_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)

    trained = ctl.GradualUnfreezing(phases=[ctl.Stage(train=["0.bias", "1"])])
    adaptation = ctl.adapt(model, copy.deepcopy(model), [trained])
    assert kept(adaptation) == 2 + 6
    move(adaptation)
    assert adaptation.drift()["0"] == pytest.approx((2 * 0.25 / 6) ** 0.5)


def test_a_block_that_is_found_later_gets_its_start_then():
    """Before, all was trained; afterwards one block is, and another search may choose another."""
    adaptation, source = adapted(ctl.SurgicalFineTuning(block="best", candidates=["0", "6"]))
    search = adaptation.plan.searches[0]
    assert kept(adaptation) == 7 * LAYER
    for block in ("6", "0"):
        adaptation.replan(**search.trials()[block])
        assert set(adaptation.bound.anchors.parameters) == {f"{block}.weight", f"{block}.bias"}
    move(adaptation)
    assert torch.equal(adaptation.start["0.weight"], source[0].weight)


def test_the_way_from_the_start_leaves_frozen_weights_where_they_are():
    adaptation, source = adapted(ctl.LayerTransfer(layers=6))
    move(adaptation)
    WeightPath(adaptation.model, adaptation.start).move(0.5)
    assert torch.equal(adaptation.model[0].weight, source[0].weight)
    torch.testing.assert_close(adaptation.model[6].weight, source[6].weight + 0.25)


class TestStates:
    def state_of_before(self, source, adaptation):
        """A state as it was written when every source parameter was kept."""
        return {**adaptation.state_dict(), "start": dict(source.state_dict())}

    def test_one_that_holds_everything_is_loaded(self):
        adaptation, source = adapted(ctl.LayerTransfer(layers=6), ctl.L2SP())
        state = self.state_of_before(source, adaptation)
        again, _ = adapted(ctl.LayerTransfer(layers=6), ctl.L2SP())
        again.load_state_dict(state)
        assert kept(again) == LAYER
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in again.start.items())

    def test_the_next_one_resumes_with_the_start_it_began_with(self):
        """Into a model whose trained weights have moved since."""
        adaptation, source = adapted(ctl.LayerTransfer(layers=6), ctl.L2SP())
        move(adaptation)
        again, _ = adapted(ctl.LayerTransfer(layers=6), ctl.L2SP())
        move(again)
        again.load_state_dict(adaptation.state_dict())
        assert torch.equal(again.start["6.weight"], source[6].weight)
        assert again.drift() == adaptation.drift()

    @pytest.mark.parametrize("change", [lambda t: t[:1], None])
    def test_one_without_a_value_that_is_needed_is_refused(self, change):
        adaptation, _ = adapted(ctl.LayerTransfer(layers=6))
        state = adaptation.state_dict()
        value = state["start"].pop("6.weight")
        if change is not None:
            state["start"]["6.weight"] = change(value)
        with pytest.raises(ctl.PlanError, match="anchors are not those of this adaptation"):
            adaptation.load_state_dict(state)


@pytest.mark.parametrize(
    ("value", "given", "other"),
    [(1.0, 1.009, False), (1.0, 1.011, True), (0.0, 5e-7, False), (0.0, 2e-6, True), (-2.0, -2.03, True)],
)
def test_a_source_differs_by_more_than_rounding(value, given, other):
    """A hundredth of the starting value, or a millionth; names and shapes that it has alone do not count."""
    model = nn.Linear(1, 1)
    plan = ctl.adapt(model, copy.deepcopy(model)).plan
    nn.init.constant_(model.weight, given)
    start = {"weight": torch.tensor([[value]]), "bias": torch.zeros(2), "elsewhere": torch.zeros(1)}
    assert differs(model, start, plan) == ("weight" if other else None)


@pytest.mark.parametrize(("change", "drift"), [(0.0, 0.0), (2.0, 1.0)])
def test_a_layer_that_starts_at_zero_drifts_by_all_or_nothing(change, drift):
    source = nn.Linear(3, 3)
    nn.init.zeros_(source.weight)
    nn.init.zeros_(source.bias)
    adaptation = ctl.adapt(nn.Linear(3, 3), source)
    nn.init.constant_(adaptation.model.bias, change)
    assert list(adaptation.drift().values()) == [drift]


def test_an_anchor_is_placed_anew_if_its_parameter_lies_otherwise_or_elsewhere():
    model = nn.Conv2d(2, 3, 2)
    adaptation = ctl.adapt(model, copy.deepcopy(model))
    anchors, parameter = adaptation.bound.anchors, model.weight.detach()
    first = anchors.of("weight", parameter, "fp32")
    assert anchors.of("weight", parameter.clone(), "fp32") is first
    turned = parameter.to(memory_format=torch.channels_last)
    second = anchors.of("weight", turned, "fp32")
    assert (second.stride(), second is first) == (turned.stride(), False)
    elsewhere = anchors.of("weight", turned.to("meta"), "fp32")
    assert (elsewhere.device.type, elsewhere.stride()) == ("meta", turned.stride())
