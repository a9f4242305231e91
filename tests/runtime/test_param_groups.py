"""Groups: real rates, by name, each trained parameter once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.param_groups import _base_rate, _decays
from conservtl.testing.weights import random_weights


def adapted(*strategies, fresh=()):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    return ctl.adapt(model, random_weights(model, 0), strategies, fresh=fresh)


def groups(optimizer):
    return {tuple(g["param_names"]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}


def test_one_group_where_nothing_differs():
    """Biases and norms have groups of their own only if weight decay would act on them."""
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    decayed = ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=True)
    assert groups(adapted(decayed).optimizer(torch.optim.AdamW, lr=0.1)) == {names: (0.1, 0.01)}
    assert groups(adapted().optimizer(torch.optim.SGD, lr=0.1)) == {names: (0.1, 0.0)}
    assert groups(adapted().optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.0)) == {names: (0.1, 0.0)}
    assert groups(adapted().optimizer(torch.optim.AdamW, lr=0.1)) == {
        ("0.weight", "2.weight"): (0.1, 0.01),
        ("0.bias", "1.weight", "1.bias", "2.bias"): (0.1, 0.0),
    }


def test_by_rate_and_by_weight_decay():
    optimizer = adapted(ctl.DiscriminativeLR(groups={"2": 0.5}), ctl.L2SP()).optimizer(torch.optim.AdamW, lr=0.1)
    assert groups(optimizer) == {
        ("0.weight", "0.bias", "1.weight", "1.bias"): (0.1, 0.0),
        ("2.weight", "2.bias"): (0.05, 0.0),
    }


WRAPPED = {
    "class": (torch.optim.AdamW, {"weight_decay": 0.2}),
    "default": (torch.optim.AdamW, {}),
    "partial": (functools.partial(torch.optim.SGD, weight_decay=0.2), {}),
    "open": (lambda params, **options: torch.optim.AdamW(params, **options), {"lr": 0.1}),
}


@pytest.mark.parametrize(("cls", "options"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("asked", [None, False, True])
def test_the_decay_column_is_what_the_optimizer_does(cls, options, asked):
    """A parameter without gradient stays or shrinks; on norms and biases only if it is asked for."""
    adaptation = adapted(ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=asked))
    optimizer = adaptation.optimizer(cls, **{"lr": 0.1, **options})
    before = {}
    for name, parameter in adaptation.model.named_parameters():
        before[name] = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {n for n, p in adaptation.model.named_parameters() if not torch.equal(p, before[n])}
    norms = [name for name in before if adaptation.plan[name].kind != "weight"]
    assert shrunk == ({"0.weight", "2.weight"} | (set(norms) if asked else set()))
    assert shrunk == {row.name for row in adaptation.plan.rows if row.weight_decay}
    assert [line.split()[-1] for line in str(adaptation.plan).splitlines()[2:4]] == ["optimizer's"] * 2


def test_the_decay_column_of_a_pull():
    """Nothing decays what is pulled, nor norms and biases; beta decays what is fresh."""
    plan = adapted(ctl.L2SP(alpha=0.1, beta=0.02), fresh=["2"]).plan
    assert [line.split()[-2:] for line in str(plan).splitlines()[2:4]] == [["0.1", "–"], ["–", "0.02"]]


def test_a_gain_without_gradient_stays_one():
    """100 steps of AdamW with its own weight decay, in the lines of the README: 0.905 if it were decayed."""
    adaptation = adapted(ctl.L2SP(alpha=0.1), ctl.DiscriminativeLR(decay=0.8))
    with torch.no_grad():
        adaptation.model[1].weight.fill_(1.0)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    for _ in range(100):
        adaptation.model[1].weight.grad = torch.zeros(3)
        optimizer.step()
        optimizer.zero_grad()
    assert adaptation.model[1].weight.tolist() == [1.0] * 3


def test_beta_covers_what_is_fresh():
    optimizer = adapted(ctl.L2SP(on="all"), fresh=["2"]).optimizer(torch.optim.AdamW, lr=0.1)
    assert {decay for _, decay in groups(optimizer).values()} == {0.0}


def test_frozen_layers_are_in_no_group_and_do_not_shift_the_rates_of_others():
    """Depth is counted over all layers."""
    free = adapted(ctl.DiscriminativeLR(decay=0.5)).optimizer(torch.optim.SGD, lr=0.1)
    held = adapted(ctl.DiscriminativeLR(decay=0.5), ctl.LayerTransfer(layers=1)).optimizer(torch.optim.SGD, lr=0.1)
    rates = [{name: g["lr"] for g in o.param_groups for name in g["param_names"]} for o in (free, held)]
    assert rates[1] == {name: lr for name, lr in rates[0].items() if name.startswith("2")}


def test_the_optimizers_own_default_rate():
    assert {lr for lr, _ in groups(adapted().optimizer(torch.optim.AdamW)).values()} == {1e-3}
    made = adapted().optimizer(functools.partial(torch.optim.AdamW, lr=0.3))
    assert {lr for lr, _ in groups(made).values()} == {0.3}


def test_an_optimizer_without_weight_decay():
    optimizer = adapted(ctl.L2SP()).optimizer(torch.optim.Rprop, lr=0.1)
    assert "weight_decay" not in optimizer.param_groups[0]


class TakesTensors(torch.optim.SGD):
    """Reads its groups before torch does, and knows no names."""

    def __init__(self, params, lr):
        self.sizes = [parameter.numel() for group in params for parameter in group["params"]]
        super().__init__(params, lr=lr)


def test_an_optimizer_that_takes_no_names():
    """0.1 × (w − w⁰) is the whole gradient: a step of 0.5 takes 5 % of a deviation of 1 back."""
    adaptation = adapted(ctl.L2SP(alpha=0.1, on="all"))
    optimizer = adaptation.optimizer(TakesTensors, lr=0.5)
    assert optimizer.sizes == [6, 3, 3, 3, 6, 2]
    start = adaptation.model[0].weight.detach().clone()
    with torch.no_grad():
        adaptation.model[0].weight.add_(1)
    optimizer.step()
    torch.testing.assert_close(adaptation.model[0].weight.detach(), start + 0.95)
    with pytest.raises(TypeError, match="momentum"):
        adapted().optimizer(TakesTensors, lr=0.5, momentum=0.9)


def test_a_phase_that_comes_later_is_in_the_groups_already():
    """Freezing never touches the list of groups."""
    adaptation = adapted(ctl.GradualUnfreezing(scales=(0.5, 1.0)))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 6
    assert {g["lr"] for g in optimizer.param_groups} == {0.05}
    members = [id(p) for g in optimizer.param_groups for p in g["params"]]
    adaptation.start_phase(1)
    assert members == [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_groups_are_named_after_their_layers():
    """Each name once, as monitors of rates ask."""
    by_layer = ctl.DiscriminativeLR(decay=0.5)
    within = ctl.DiscriminativeLR(groups={"0.weight": 0.3, "0.bias": 0.2, "1.weight": 0.1})
    for strategies, cls, expected in (
        ((), torch.optim.SGD, ["0 … 2"]),
        ((by_layer,), torch.optim.SGD, ["0", "2"]),
        ((by_layer,), torch.optim.AdamW, ["0 (weight)", "0 (bias, norm)", "2 (weight)", "2 (bias)"]),
        ((within,), torch.optim.AdamW, ["0 (weight)", "0 (bias)", "0 (norm)", "0 … 2", "2"]),
    ):
        assert [group["name"] for group in adapted(*strategies).optimizer(cls, lr=0.1).param_groups] == expected


class TensorRMSNorm(nn.Module):
    """A norm of another library, known by its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


class Everything(nn.Module):
    """What is decayed by convention, and what is not whatever its shape."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.relative_attention_bias = nn.Embedding(9, 2)
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.gamma = nn.Parameter(torch.ones(4))
        self.norm, self.group, self.layer = TensorRMSNorm(), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.unbiased = nn.Linear(4, 4)
        self.one = nn.Linear(4, 1)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


DECAYED = {"embed.weight", "pos_embed", "unbiased.weight", "one.weight"}


@pytest.mark.parametrize("phases", [(), (ctl.LPFT(epochs=1),)], ids=["one phase", "two"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {"weight_decay": 0.1})],
)
def test_decay_by_convention(cls, options, phases):
    model = Everything()
    adaptation = ctl.adapt(model, random_weights(model, 0), phases, head=["head"] if phases else None)
    optimizer = adaptation.optimizer(cls, lr=0.1, **options)
    decayed = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert decayed == {row.name for row in adaptation.plan.rows if row.weight_decay} == DECAYED
    asked = ctl.adapt(model, random_weights(model, 0), [ctl.DiscriminativeLR(decay=1, decay_biases_and_norms=True)])
    (group,) = asked.optimizer(cls, lr=0.1, **options).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["weight_decay"]


def test_amplitudes_are_not_decayed_unless_asked():
    for asked, decay in ((None, 0.0), (True, 0.01)):
        strategies = [ctl.LHUC(), ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=asked)]
        (group,) = adapted(*strategies).optimizer(torch.optim.AdamW, lr=0.1).param_groups
        assert (group["param_names"], group["weight_decay"]) == (["1.lhuc"], decay)


class Open(torch.optim.SGD):
    """An optimizer that hands on arguments."""

    def __init__(self, params, **options):
        super().__init__(params, **options)


class Bare(torch.optim.SGD):
    """An optimizer with a rate and nothing else."""

    def __init__(self, params, lr=None):
        super().__init__(params, lr)


@pytest.mark.parametrize(
    ("cls", "options", "decays"),
    [
        (torch.optim.SGD, {}, False),
        (torch.optim.SGD, {"weight_decay": 0.1}, True),
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"weight_decay": 0}, False),
        (Open, {}, True),  # nobody knows
        (Open, {"weight_decay": 0.0}, False),
        (Bare, {}, False),
    ],
)
def test_whether_an_optimizer_decays(cls, options, decays):
    assert _decays(cls, options) == decays


@pytest.mark.parametrize(
    ("cls", "options", "rate"),
    [(torch.optim.AdamW, {}, 1e-3), (torch.optim.AdamW, {"lr": 0.5}, 0.5), (Bare, {"lr": torch.tensor(0.5)}, 0.5)],
)
def test_the_rate_that_ratios_multiply(cls, options, rate):
    assert _base_rate(cls, "X", options) == rate


@pytest.mark.parametrize(("cls", "options"), [(Bare, {}), (Open, {}), (torch.optim.AdamW, {"lr": None})])
def test_without_a_rate_there_is_nothing_to_multiply(cls, options):
    with pytest.raises(ctl.SpecError, match="X: the rates are multiples of its lr, but none was given"):
        _base_rate(cls, "X", options)


@pytest.mark.parametrize("rate", [1.0, 1.01])
def test_a_decoupled_pull_reaches_the_source_in_one_step_at_most(rate):
    adaptation = ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2), [ctl.L2SP(alpha=1.0, mode="decoupled")])
    if rate == 1.0:
        adaptation.optimizer(torch.optim.SGD, lr=rate)
        return
    with pytest.raises(ctl.SpecError, match=r"rate × strength = 1\.01 overshoots"):
        adaptation.optimizer(torch.optim.SGD, lr=rate)
