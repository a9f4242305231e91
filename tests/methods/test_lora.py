"""Low-rank adaptation: changes of weights against dense ones, and what follows the merged weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import conservtl as ctl

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
