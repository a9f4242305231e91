"""Low-rank adaptation: changes of weights against dense ones, and what follows the merged weights."""

from __future__ import annotations

import copy
import pickle
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import conservtl as ctl
from conservtl.plan import Penalty
from conservtl.plan.table import lines

MODULES = {
    "linear": (nn.Linear(5, 4), (3, 2, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding="valid", dilation=2), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 1), padding="same", padding_mode="reflect", bias=False), (2, 3, 5, 4)),
    "conv3d": (nn.Conv3d(2, 4, 2, stride=2, padding=1), (2, 2, 3, 3, 3)),
    "one example": (nn.Conv2d(2, 3, 2), (2, 4, 4)),
}


class Net(nn.Module):
    """A convolution, a linear map and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.head = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.conv(x).mean(2)).tanh())


class OwnPenalty(Penalty):
    """A penalty that has no column of the plan."""

    kind: Literal["own_penalty_beside_lora"] = "own_penalty_beside_lora"

    def describe(self):
        return "own"

    def pull_on(self, row):
        return 0.7 if row.kind == "weight" else None

    def value(self, moving):
        return sum((item.parameter - item.anchor).abs().sum() for item in moving)


class OwnPull(ctl.Strategy):
    """A pull on what is trained of the source."""

    kind: Literal["own_pull_beside_lora"] = "own_pull_beside_lora"

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows if row.origin == "source" and not row.frozen)
        return plan.with_penalty(OwnPenalty(by=self.label, names=names))


X = torch.randn(4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def network():
    torch.manual_seed(0)
    return Net().double()


def adapted(*others, moved=True, model=None, **fields):
    model = network() if model is None else model
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.LoRA(**{"rank": 2, "alpha": 3} | fields), *others])
    torch.manual_seed(2)
    with torch.no_grad():
        for row in adaptation.plan.rows:
            if row.low_rank is not None and moved:
                parameter = model.get_parameter(row.name)
                parameter.copy_(torch.randn_like(parameter))
    return adaptation


def dense(module, scale):
    """W + s B A, written out."""
    change = scale * torch.einsum("or,r...->o...", module.lora_B.detach(), module.lora_A.detach())
    return module.weight.detach() + change


@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_the_merged_weight(name):
    module, shape = MODULES[name]
    model = nn.Sequential(copy.deepcopy(module)).double()
    adaptation = adapted(model=model, on=["0"])
    x = torch.randn(shape, dtype=torch.float64)
    plain = copy.deepcopy(module).double()
    plain.weight.data = dense(model[0], 1.5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)
    assert torch.equal(model[0](input=x), model(x))
    merged = adaptation.merged()
    assert list(merged.state_dict()) == [f"0.{key}" for key in module.state_dict()]
    torch.testing.assert_close(merged[0].weight, plain.weight, rtol=1e-12, atol=1e-14)
    assert not merged[0]._forward_hooks


def test_training_moves_the_factors_alone():
    adaptation = adapted(moved=False)
    model, source = adaptation.model, network()
    assert torch.equal(model(X), source(X))  # bit for bit
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(X), source(X))
    start = source.state_dict()
    assert set(adaptation.plan.trained) == set(model.state_dict()) - set(start)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in start.items())


def test_the_merged_weights_are_pulled_measured_and_taken_back():
    """alpha/2 |s B A|² and its gradient by automatic differentiation; drift and interpolation as of dense weights."""
    adaptation = adapted(ctl.L2SP(alpha=0.4, beta=0.3), ctl.WeightInterpolation(t=0.5))
    model = adaptation.model
    changes = {name: dense(getattr(model, name), 1.5) - getattr(model, name).weight for name in ("conv", "body")}
    expected = 0.2 * sum(change.square().sum() for change in changes.values())
    assert adaptation.penalty().item() == pytest.approx(expected.item(), rel=1e-6)
    leaves = [model.conv.lora_A.detach().requires_grad_(), model.conv.lora_B.detach().requires_grad_()]
    (0.2 * (1.5 * (leaves[1] @ leaves[0].flatten(1))).square().sum()).backward()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
    before = model.conv.lora_A.detach().clone(), model.conv.lora_B.detach().clone()
    whole = copy.deepcopy(model.state_dict())
    optimizer.step()
    for old, new, leaf in zip(before, (model.conv.lora_A, model.conv.lora_B), leaves, strict=True):
        torch.testing.assert_close(old - new.detach(), leaf.grad)  # no decay beside it
    model.load_state_dict(whole)
    weights = {name: torch.cat([getattr(model, name).weight.flatten(), getattr(model, name).bias]) for name in changes}
    for name, change in changes.items():
        assert adaptation.drift()[name] == pytest.approx(float(change.norm() / weights[name].norm()))
    adaptation.finish()
    torch.testing.assert_close(dense(model.body, 1.5), model.body.weight + changes["body"] / 2)


@pytest.mark.parametrize("first", [True, False])
def test_an_input_transform_is_merged_behind_it(first):
    model = network()
    both = [ctl.LoRA(rank=2), ctl.InputTransform(bias=False)]
    adaptation = ctl.adapt(model, network(), both if first else both[::-1], example=X)
    assert "head.weight" not in adaptation.plan.trained
    with torch.no_grad():
        for name in adaptation.plan.trained:
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)))
    merged = adaptation.merged()
    assert list(merged.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(merged(X), model(X))


def test_copies_and_pickles_have_factors_of_their_own_and_dropout_acts_on_the_input_of_a():
    model = adapted(dropout=0.5, on=["body"]).model
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    model.eval(), twin.eval()
    assert torch.equal(twin(X), model(X))
    with torch.no_grad():
        model.body.lora_B.zero_()
    assert not torch.equal(twin(X), model(X))
    inputs = twin.conv(X).mean(2)
    torch.manual_seed(5)
    found = twin.train().body(inputs)
    torch.manual_seed(5)
    kept = F.dropout(inputs, 0.5) @ twin.body.lora_A.T @ twin.body.lora_B.T
    torch.testing.assert_close(found, F.linear(inputs, twin.body.weight, twin.body.bias) + 1.5 * kept)


class Odd(nn.Module):
    """Modules that cannot be changed, or are read otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.tied, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.normed, self.norm = weight_norm(nn.Linear(8, 8)), nn.LayerNorm(8)
        self.read, self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        x = self.twin(self.tied(self.grouped(x.mT).mT))
        return self.head(self.plain(F.linear(self.norm(self.normed(x)), self.read.weight)))


EXAMPLE = torch.zeros(2, 3, 8)


def test_by_default_those_that_can_be_changed_are_and_the_head_is_not():
    plan = ctl.adapt(Odd(), Odd(), [ctl.LoRA(rank=1)], example=EXAMPLE).plan
    assert plan.trained == ("plain.lora_A", "plain.lora_B")
    (change,) = [row.low_rank for row in plan.rows if row.low_rank is not None]
    assert (change.weight, change.scale) == ("plain.weight", 8.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on": ["attention"]}, r"'attention' must match a linear map .* is inside torch's MultiheadAttention"),
        ({"on": ["grouped"]}, r"'grouped' is a convolution in groups. Name others in on"),
        ({"on": ["t*"]}, r"'t\*' must match .*; 'tied' shares its weight with another module"),
        ({"on": ["normed"]}, r"'normed' has a parametrised weight"),
        ({"on": ["norm"]}, r"'norm' is a LayerNorm"),
        ({"on": ["read"]}, r"'read' must be called in a forward pass; the model reads its weight otherwise"),
        ({"on": ["plane"]}, r"'plane' must match a layer or a module with a weight; it matches none.*'plain'"),
        ({"rank": 9}, r"outside its head, a linear map .* with no fewer inputs and outputs than rank, 9; it has none"),
    ],
)
def test_modules_that_cannot_be_changed_are_refused_by_name(fields, message):
    model = Odd()
    before = list(model.state_dict())
    with pytest.raises(ctl.InputError, match=message):
        ctl.adapt(model, Odd(), [ctl.LoRA(**{"rank": 1} | fields)], example=EXAMPLE)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ctl.LHUC(on=["body"]), r"LoRA and another strategy both add to 'body' .*'body.lhuc'.* by on"),
        (ctl.LoRA(on=["body"]), r"the model has factors already. Name one LoRA"),
        (ctl.LayerTransfer(layers=["body"], freeze=False), r"a change of 'body.weight', but LayerTransfer trains the"),
    ],
)
def test_two_strategies_on_one_module(other, message):
    with pytest.raises(ctl.InputError, match=message):
        adapted(other)


def test_a_fresh_weight_is_trained_itself_and_its_factors_are_not():
    plan = ctl.adapt(network(), network(), [ctl.LoRA(rank=2)], fresh=["body"]).plan
    assert set(plan.trained) == {"conv.lora_A", "conv.lora_B", "body.weight", "body.bias"}


def planned(*strategies, fresh=("head",)):
    return ctl.adapt(network(), network(), [*strategies, ctl.LoRA(rank=2)], fresh=fresh).plan


def layers_trained(plan, phase=0):
    return list(dict.fromkeys(row.layer for row in plan.rows if row.name not in plan.frozen_in(phase)))


class TestFactorsCountAsTheirWeights:
    @pytest.mark.parametrize(
        ("fields", "rates"),
        [
            ({"decay": 0.5}, (0.025, 0.05, 0.1)),
            ({"decay": 0.5, "toward": "input"}, (0.1, 0.05, 0.1)),  # a fresh head takes the full rate
            ({"lowest": 0.01}, (0.001, 0.01, 0.1)),
            ({"thirds": (0.1, 0.3, 1.0)}, (0.01, 0.03, 0.1)),
            ({"source": 1e-5, "fresh": 1e-3}, (1e-5, 1e-5, 1e-3)),
            ({"groups": {"conv": 0.2}}, (0.02, 0.1, 0.1)),
        ],
    )
    def test_rates_are_those_of_the_layer_and_of_the_source(self, fields, rates):
        plan = planned(ctl.DiscriminativeLR(**fields))
        for name in ("lora_A", "lora_B"):
            found = [plan[f"{layer}.{name}"].rate(0.1) for layer in ("conv", "body")]
            assert [*found, plan["head.weight"].rate(0.1)] == pytest.approx(rates)

    @pytest.mark.parametrize("strategy", [ctl.LPFT(epochs=1), ctl.GradualUnfreezing()])
    def test_a_phase_for_the_head_leaves_the_body_as_it_is(self, strategy):
        model = network()
        adaptation = ctl.adapt(model, network(), [strategy, ctl.LoRA(rank=2)], fresh=["head"])
        assert layers_trained(adaptation.plan) == ["head"]
        assert layers_trained(adaptation.plan, 1) == ["conv", "body", "head"]
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {name: adaptation.drift()[name] for name in ("conv", "body")} == {"conv": 0.0, "body": 0.0}

    @pytest.mark.parametrize(
        ("strategy", "trained"),
        [
            (ctl.LayerTransfer(side="input", layers=1), ["body", "head"]),
            (ctl.LayerTransfer(side="input", layers=1, rest="fresh"), []),
            (ctl.SurgicalFineTuning(block="conv"), ["conv", "head"]),
            (ctl.SurgicalFineTuning(block=-1), ["body", "head"]),
            (ctl.GradualUnfreezing(by="layer", at="input"), ["conv"]),
            (ctl.FeatureExtraction(), []),
            (ctl.FeatureExtraction(classifier="svm"), []),
            (ctl.LayerTransfer(side="input", layers=2), []),
        ],
    )
    def test_frozen_layers_do_not_move_and_factors_that_are_all_frozen_are_refused(self, strategy, trained):
        if trained:
            assert layers_trained(planned(strategy)) == trained
        else:
            with pytest.raises(ctl.SpecError, match=rf"{strategy.label} freezes all factors .* Leave one of the two"):
                planned(strategy)

    def test_a_block_of_a_model_that_was_handed_in_frozen_is_trained_by_its_factors(self):
        model = network().requires_grad_(False)
        plan = ctl.adapt(model, network(), [ctl.LoRA(rank=2), ctl.SurgicalFineTuning(block="conv")]).plan
        assert set(plan.trained) == {name for name in plan.factors if plan[name].layer == "conv"} != set()

    @pytest.mark.parametrize("others", [(), (ctl.FeatureExtraction(),)])
    def test_factors_of_a_fresh_head_alone_are_refused(self, others):
        with pytest.raises(ctl.PlanError, match=r"must change a weight .* are fresh, such as that of 'head'"):
            ctl.adapt(network(), network(), [ctl.LoRA(on=["head"], rank=2), *others], fresh=["head"])

    def test_candidates_for_the_best_block_are_layers_with_factors(self):
        assert planned(ctl.SurgicalFineTuning(block="best")).searches[0].candidates == ("conv", "body")

    @pytest.mark.parametrize("fresh", [("head",), ()])
    @pytest.mark.parametrize(
        "strategy",
        [
            *(ctl.L1SP(), ctl.GroupLassoSP(), ctl.FisherSP(), ctl.Mixout(), ctl.AutoRGN(), ctl.SelectiveDecay()),
            *(ctl.Projection(), ctl.Projection(radius="learn")),
        ],
        ids=repr,
    )
    def test_pulls_on_weights_that_are_not_trained_are_refused(self, strategy, fresh):
        with pytest.raises(ctl.SpecError, match=rf"^{strategy.label} acts on trained weights .*frozen.* or use L2SP"):
            planned(strategy, fresh=fresh)

    def test_a_penalty_of_ones_own_on_no_trained_weight_is_refused_and_else_shows_its_strength(self):
        with pytest.raises(ctl.SpecError, match=r"^OwnPull acts on trained weights"):
            planned(OwnPull())
        plan = ctl.adapt(network(), network(), [OwnPull()]).plan
        assert [line[5] for line in lines(plan)] == ["0.7"] * 3

    @pytest.mark.parametrize(("mode", "cell"), [("coupled", "0.3"), ("decoupled", "0.3 decoupled")])
    def test_the_plan_shows_the_pull_on_the_merged_weights_and_no_decay_of_factors(self, mode, cell):
        plan = planned(ctl.L2SP(alpha=0.3, beta=0.2, mode=mode))
        assert [line[5:] for line in lines(plan)] == [(cell, "–"), (cell, "–"), ("–", cell.replace("3", "2"))]
        assert plan["conv.lora_A"].decay is None

    def test_per_parameter_divides_by_the_weights_that_change(self):
        plan = planned(ctl.L2SP(alpha=10.0, normalize="per_parameter"), ctl.LayerTransfer(side="input", layers=1))
        assert plan["body.weight"].pull == pytest.approx(10 / (6 * 6 * 3 + 6 * 8))

    def test_plans_are_read_back(self):
        plan = planned(ctl.DiscriminativeLR(decay=0.5))
        again = ctl.Plan.model_validate_json(plan.model_dump_json())
        assert again == plan
        assert again.fresh == ("head.weight", "head.bias")


def test_amplitudes_and_transforms_are_parameters_of_their_own():
    """They scale or shift what layers compute, change no weight by a product, and so count as fresh: full rates."""
    others = [ctl.LHUC(on=["conv"]), ctl.LoRA(rank=2, on=["body"]), ctl.InputTransform(dim=1)]
    rates = ctl.DiscriminativeLR(source=1e-5, fresh=1e-3)
    plan = ctl.adapt(network(), network(), [*others, rates, ctl.LPFT(epochs=1)], fresh=["head"], example=X).plan
    found = {name: plan[name].lr for name in plan.trained}
    own = {"conv.lhuc", "input_transform.weight", "input_transform.bias", "head.weight", "head.bias"}
    assert found == dict.fromkeys(own, 1e-3) | dict.fromkeys(("body.lora_A", "body.lora_B"), 1e-5)
    assert {row.name for row in plan.rows} - plan.frozen_in(0) == own
