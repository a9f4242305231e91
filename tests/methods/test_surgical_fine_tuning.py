"""Which parameters a block means, and what is trained beside it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.testing.weights import random_weights


def network():
    """Layers stem, layer1.0, layer1.1, layer2.0 and head, some with norms."""

    def block():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = block()
            self.layer1 = nn.ModuleList([block(), block()])
            self.layer2 = nn.ModuleList([block()])
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            x = self.layer2[0](self.layer1[1](self.layer1[0](self.stem(x))))
            return self.head(x)

    return Net()


LAYERS = ("stem", "layer1.0", "layer1.1", "layer2.0", "head")


def plan(*strategies, **options):
    model = network()
    return ctl.adapt(
        model, random_weights(model, 0), strategies, layers=[f"{name}*" for name in LAYERS], **options
    ).plan


def trained(found):
    return {found[name].layer for name in found.trained}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("first", {"stem*"}),
        (0, {"stem*"}),
        (1, {"layer1.0*"}),
        (-1, {"layer2.0*"}),
        ("last", {"layer2.0*"}),
        ("stem*", {"stem*"}),
        ("layer1*", {"layer1.0*", "layer1.1*"}),
        ("head*", {"head*"}),
    ],
)
def test_a_block(block, expected):
    found = plan(ctl.SurgicalFineTuning(block=block))
    assert trained(found) == expected
    assert {row.name for row in found.rows if row.layer in expected} == set(found.trained)


def test_the_head_beside_it():
    assert trained(plan(ctl.SurgicalFineTuning(block=1, head=True))) == {"layer1.0*", "head*"}


def test_a_fresh_head_is_trained_and_no_block():
    found = plan(ctl.SurgicalFineTuning(block="last"), fresh=["head*"])
    assert trained(found) == {"layer2.0*", "head*"}


def test_what_layer_transfer_freezes_stays_frozen():
    found = plan(ctl.SurgicalFineTuning(block="layer1*"), ctl.LayerTransfer(side="input", layers=2))
    assert trained(found) == {"layer1.1*"}


def test_frozen_norms_keep_the_sources_statistics():
    model = network()
    adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.SurgicalFineTuning(block="layer1*")])
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.randn(8, 3))
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {name.split(".")[0] for name in moved} == {"layer1"}


@pytest.mark.parametrize("block", [4, -5])
def test_a_position_outside_the_body(block):
    with pytest.raises(ctl.SpecError, match=rf"block={block} must be a position in the body of 4 layers .* -4 to 3"):
        plan(ctl.SurgicalFineTuning(block=block))


def test_a_glob_that_matches_nothing():
    with pytest.raises(ctl.SelectorError, match="layer9"):
        plan(ctl.SurgicalFineTuning(block="layer9*"))
    with pytest.raises(ctl.SelectorError, match="layer9"):
        plan(ctl.SurgicalFineTuning(block="best", candidates=["stem*", "layer9*"]))


class TestBest:
    def test_the_candidates_are_the_layers_but_for_what_is_trained_anyway(self):
        asked = [plan(ctl.SurgicalFineTuning(block="best", head=head)).searches[0].candidates for head in (False, True)]
        assert asked == [tuple(f"{name}*" for name in LAYERS), tuple(f"{name}*" for name in LAYERS[:-1])]
        fresh = plan(ctl.SurgicalFineTuning(block="best"), fresh=["head*"])
        assert fresh.searches[0].candidates == asked[1]

    def test_what_is_frozen_throughout_is_no_candidate(self):
        found = plan(ctl.SurgicalFineTuning(block="best"), ctl.LayerTransfer(side="input", layers=3))
        assert found.searches[0].candidates == ("layer2.0*", "head*")

    def test_the_plan_says_that_it_is_not_decided_and_the_optimizer_refuses(self):
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.SurgicalFineTuning(block="best", trial_epochs=1)])
        assert "each of 5 blocks trained alone for 1 epoch; the best on validation is chosen" in str(adaptation.plan)
        with pytest.raises(ctl.SpecError, match=r"Call conservtl\.best_block\(adaptation, train, valid\)"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)
        adaptation.measure([(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))])
        assert adaptation.outstanding()

    def test_a_decision_draws_the_plan_up_again_and_travels_with_the_state(self):
        model, other = network(), network()
        source = random_weights(model, 0)
        strategies = [ctl.SurgicalFineTuning(block="best", candidates=["stem", "layer1*"])]
        ours, theirs = (ctl.adapt(one, source, strategies) for one in (model, other))
        ours.replan(surgical_block="layer1*")
        assert ours.plan.measures == ()
        assert {name.split(".")[0] for name in ours.plan.trained} == {"layer1"}
        theirs.load_state_dict(ours.state_dict())
        assert theirs.plan == ours.plan
        assert {name.split(".")[0] for name, p in other.named_parameters() if p.requires_grad} == {"layer1"}
        with pytest.raises(ctl.PlanError, match="'head' is none of its candidates"):
            ours.replan(surgical_block="head")

    @pytest.mark.parametrize("fields", [{"candidates": ["stem"]}, {"trial_epochs": 3}])
    def test_its_fields_mean_nothing_without_it(self, fields):
        with pytest.raises(ValidationError, match="is for block='best'"):
            ctl.SurgicalFineTuning(block="first", **fields)
