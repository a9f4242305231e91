"""Learning hidden unit contributions: amplitudes that start at 1 and end in the weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.methods.lhuc.amplitudes import add_amplitudes, merge_amplitudes
from conservtl.methods.lhuc.hidden_units import find_hidden_units
from conservtl.testing.weights import random_weights

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()


def adapted(*others, model=None, **fields):
    model = network() if model is None else model
    return ctl.adapt(model, random_weights(model, 1), [ctl.LHUC(**fields), *others])


def disturbed(adaptation):
    with torch.no_grad():
        for name in adaptation.plan.fresh:
            parameter = dict(adaptation.model.named_parameters())[name]
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return adaptation.model.eval()


def by_hand(weights, conv, hidden, x):
    """h' = 2 sigmoid(r) h behind each ReLU, written out."""
    mean, var = (weights[f"1.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var"))
    h = nn.functional.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1)
    h = (h - mean) / (var + 1e-5).sqrt() * weights["1.weight"].view(-1, 1, 1) + weights["1.bias"].view(-1, 1, 1)
    h = (2 / (1 + torch.exp(-conv))).view(-1, 1, 1) * h.relu()
    h = h.mean((2, 3)) @ weights["5.weight"].T + weights["5.bias"]
    h = 2 / (1 + torch.exp(-hidden)) * h.relu()
    return h @ weights["7.weight"].T + weights["7.bias"]


def test_outputs_and_gradients_are_the_papers_behind_the_relu():
    """The amplitude is put on the norm, ahead of the ReLU: the same, as it is positive."""
    adaptation = adapted()
    model = disturbed(adaptation)
    assert set(adaptation.plan.trained) == {"1.lhuc", "5.lhuc"}
    conv, hidden = (model[i].lhuc.detach().clone().requires_grad_() for i in (1, 5))
    expected = by_hand(model.state_dict(), conv, hidden, X)
    assert torch.allclose(model(X), expected, rtol=1e-10)
    nn.functional.cross_entropy(expected, Y).backward()
    nn.functional.cross_entropy(model(X), Y).backward()
    assert torch.allclose(model[1].lhuc.grad, conv.grad, rtol=1e-9)
    assert torch.allclose(model[5].lhuc.grad, hidden.grad, rtol=1e-9)
    assert conv.grad.abs().min() > 0
    assert model[5].weight.grad is None


@torch.no_grad()
def test_computes_at_the_start_bit_for_bit_what_the_source_did():
    source = network()
    source.load_state_dict(random_weights(source, 1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(adapted().model.eval().to(dtype)(X.to(dtype)), source.eval().to(dtype)(X.to(dtype)))


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_merged_is_a_plain_model_that_computes_the_same(norm):
    model = network(norm)
    adaptation = adapted(model=model)
    expected = disturbed(adaptation)(X)
    merged = adaptation.merged()
    assert list(merged.state_dict()) == list(network(norm).state_dict())
    assert not any(module._forward_hooks for module in merged.modules())
    assert torch.allclose(merged(X), expected, rtol=1e-12)
    assert torch.equal(model(X), expected)  # merging was done to a copy
    plain = network(norm).eval()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(X), merged(X))


def test_training_moves_the_amplitudes_alone_and_statistics_stand_still():
    """A norm's own parameters are frozen though its amplitudes are not: frozen it is."""
    adaptation = adapted()
    before = {name: tensor.clone() for name, tensor in adaptation.model.state_dict().items()}
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    adaptation.model.train()
    nn.functional.cross_entropy(adaptation.model(X), Y).backward()
    optimizer.step()
    after = adaptation.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"1.lhuc", "5.lhuc"}


def test_statistics_of_the_source_are_copied_beside_amplitudes():
    """An amplitude is fresh, but its norm is not."""
    model = network()
    weights = random_weights(model, 1)
    ctl.adapt(model, weights, [ctl.LHUC()])
    assert torch.equal(model[1].running_mean, weights["1.running_mean"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy of a copy"])
def test_a_copy_scales_by_its_own_amplitudes(how):
    model = disturbed(adapted())
    expected = model(X)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.deepcopy(copy.deepcopy(model) if how == "copy of a copy" else model)
    with torch.no_grad():
        for module in (model[1], model[5]):
            module.lhuc.zero_()
    assert torch.equal(twin(X), expected)
    assert not torch.equal(model(X), expected)
    assert ctl.LHUC().merge(twin)
    assert torch.allclose(twin(X), expected, rtol=1e-12)


def test_state_dict_there_and_back():
    first, second = adapted(), adapted()
    disturbed(first)
    second.model.load_state_dict(first.model.state_dict())
    assert torch.equal(second.model.eval()(X), first.model(X))


def test_stands_in_its_layers_and_leaves_head_and_order_alone():
    plan, plain = adapted().plan, ctl.adapt(network(), random_weights(network(), 1)).plan
    assert plan.layers == plain.layers == plan.own_layers
    assert plan.head == plain.head
    assert (plan["1.lhuc"].layer, plan["5.lhuc"].layer) == ("0", "5")
    assert [row.reason for row in plan.rows if row.added] == ["amplitudes of hidden units, which start at 1"] * 2
    assert "0      " in str(plan)


class TestUnits:
    def test_residual_blocks_have_one_behind_each_convolution(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.bn1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
                self.conv2, self.bn2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
                self.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        model = nn.Sequential(Block(), Block(), nn.Linear(3, 2))
        inside = ["bn1", "bn2", "shortcut.1"]
        assert find_hidden_units(model, find_layers(model)) == [f"{i}.{name}" for i in (0, 1) for name in inside]

    def test_the_example_shows_which_norm_is_behind_which_weight(self):
        """torch registers both norms of a transformer layer last; and its attention projects without being asked."""
        model = nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True),
            nn.Linear(4, 2),
        )
        names = find_hidden_units(model, find_layers(model), example=torch.randn(2, 3, 4))
        assert names == ["0.linear1", "0.norm2", "1.linear1", "1.linear2"]

    def test_layers_and_modules_by_glob(self):
        model = network()
        layers = find_layers(model)
        assert find_hidden_units(model, layers, ["0"]) == ["1"]
        assert find_hidden_units(model, layers, ["7"]) == ["7"]
        assert find_hidden_units(model, layers, ["1", "5"]) == ["1", "5"]
        with pytest.raises(
            ctl.SelectorError, match=r"LHUC: 'conv1' must match a layer, .*it matches none\. There are 0, 5, 7, 1\."
        ):
            find_hidden_units(model, layers, ["conv1"])

    def test_a_model_that_is_all_head_is_refused_and_left_as_it_was(self):
        model = nn.Linear(3, 2)
        with pytest.raises(ctl.SpecError, match="nothing but its head"):
            ctl.adapt(model, random_weights(model, 0), [ctl.LHUC()])
        assert list(model.state_dict()) == ["weight", "bias"]

    def test_a_norm_with_a_forward_of_its_own_is_not_taken_for_one(self):
        """Its channels may stand on another axis, as in torchvision's LayerNorm2d."""

        class ChannelsFirst(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.movedim(1, -1)).movedim(-1, 1)

        model = nn.Sequential(nn.Conv2d(2, 5, 1), ChannelsFirst(5), nn.ReLU(), nn.Flatten(), nn.Linear(125, 2))
        assert find_hidden_units(model, find_layers(model)) == ["0"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Linear(3, 3), (3, 3, 3), -1),
        (nn.Conv1d(3, 3, 1), (3, 3, 3), 1),
        (nn.Conv1d(3, 3, 1), (3, 3), 0),
        (nn.Conv3d(3, 3, 1, groups=3), (3, 3, 3, 3, 3), 1),
        (nn.BatchNorm1d(3), (3, 3), 1),
        (nn.BatchNorm1d(3), (3, 3, 3), 1),
        (nn.GroupNorm(1, 3), (3, 3, 3), 1),
        (nn.LayerNorm(3), (3, 3, 3), -1),
        (nn.RMSNorm(3), (3, 3, 3), -1),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_channels_are_where_the_module_has_them(module, shape, axis):
    """All lengths are equal, so that a wrong axis would raise nothing."""
    module = copy.deepcopy(module).eval()
    x = torch.randn(shape)
    plain = module(x)
    add_amplitudes(module, [""])
    module.lhuc.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    factor = 2 * torch.tensor([-1.0, 0.0, 2.0]).sigmoid()
    expected = (plain.movedim(axis, -1) * factor).movedim(-1, axis)
    assert torch.allclose(module(x), expected)
    assert merge_amplitudes(module)
    assert torch.allclose(module(x), expected, atol=1e-6)


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x, lengths=None):
        if lengths is not None:
            packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
            return packed.data
        return self.head(self.lstm(x)[0].mean(1))


class TestRecurrent:
    def test_the_output_of_the_last_level_is_scaled_and_stays_unmerged(self):
        model, x = _Recurrent(), torch.randn(4, 5, 3)
        adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.LHUC()])
        assert adaptation.plan["lstm.lhuc"].layer == "lstm.1"
        plain, _ = model.lstm(x)
        disturbed(adaptation)
        factor = 2 * model.lstm.lhuc.sigmoid()
        assert torch.allclose(model.lstm(x)[0], plain * factor)
        packed = model(x, torch.tensor([5, 5, 5, 5]))
        assert torch.allclose(packed.view(5, 4, 8).transpose(0, 1), plain * factor, atol=1e-6)
        merged = adaptation.merged()
        assert torch.equal(merged(x), model(x))
        assert not ctl.LHUC().merge(merged)


def test_shared_and_parametrised_weights_stay_unmerged():
    """Scaling a weight that another module shares would scale that one too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[4])
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.LHUC()])
    x = torch.randn(4, 3)
    expected = disturbed(adaptation)(x)
    merged = adaptation.merged()
    assert torch.allclose(merged(x), expected)
    assert {name for name in merged.state_dict() if "lhuc" in name} == {"0.lhuc", "2.lhuc", "4.lhuc"}


def test_refused_twice_and_the_first_stays():
    model = network()
    weights = random_weights(model, 1)
    ctl.adapt(model, weights, [ctl.LHUC()])
    with pytest.raises(ctl.SpecError, match="module '1' has amplitudes already"):
        ctl.adapt(model, weights, [ctl.LHUC()])
    assert "1.lhuc" in model.state_dict()
    ctl.LHUC().retract(model)
    assert list(model.state_dict()) == list(network().state_dict())


def test_a_source_with_amplitudes_is_refused():
    """They would be left behind, and with them what the source computed."""
    source = disturbed(adapted())
    model = network()
    with pytest.raises(ctl.SourceError, match=r"holds '1\.lhuc', which a strategy added"):
        ctl.adapt(model, source.state_dict(), [ctl.LHUC()])
    assert list(model.state_dict()) == list(network().state_dict())


class TestTogether:
    def test_l2_sp_decays_amplitudes_to_one_only_when_on_all(self):
        assert adapted(ctl.L2SP(beta=0.5)).plan["1.lhuc"].decay is None
        adaptation = adapted(ctl.L2SP(beta=0.5, on="all"))
        disturbed(adaptation)
        before = adaptation.model[1].lhuc.detach().clone()
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        adaptation.model(X).sum().mul(0).backward()
        optimizer.step()
        assert torch.allclose(adaptation.model[1].lhuc, before * (1 - 0.1 * 0.5))

    def test_layer_transfer_takes_no_offence_at_what_is_added(self):
        plan = adapted(ctl.LayerTransfer(layers=1), freeze=False).plan
        assert {row.name for row in plan.rows if row.frozen} == {"0.weight", "0.bias", "1.weight", "1.bias"}
        plan = adapted(ctl.LayerTransfer(layers=1, rest="fresh", freeze=False)).plan
        assert set(plan.trained) == {row.name for row in plan.rows}

    def test_rates_and_phases(self):
        plan = adapted(ctl.DiscriminativeLR(decay=0.5), freeze=False).plan
        assert (plan["1.lhuc"].scale, plan["0.weight"].scale) == (1.0, 0.25)
        plan = adapted(ctl.GradualUnfreezing(), freeze=False).plan
        assert plan.frozen_in(0) == {row.name for row in plan.rows if not row.added}
        assert adapted(ctl.GradualUnfreezing(by="layer")).plan.trained == ("1.lhuc", "5.lhuc")

    def test_a_new_head_is_trained_beside_them(self):
        model = network()
        weights = random_weights(model, 1)
        plans = [
            ctl.adapt(model, weights, [ctl.LHUC()], fresh=["7"]).plan,
            adapted(ctl.FeatureExtraction()).plan,
        ]
        for plan in plans:
            assert set(plan.trained) == {"1.lhuc", "5.lhuc", "7.weight", "7.bias"}

    def test_the_source_to_compare_with_has_no_amplitudes(self):
        adaptation = adapted(ctl.OutputConservation(rho=0.5))
        expected = adaptation.source_view(X).outputs
        disturbed(adaptation)
        assert torch.equal(adaptation.source_view(X).outputs, expected)

    def test_two_that_name_different_modules(self):
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.LHUC(on=["0"]), ctl.LHUC(on=["5"])])
        assert set(adaptation.plan.trained) == {"1.lhuc", "5.lhuc"}

    def test_a_cut_into_layers_of_ones_own(self):
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.LHUC()], layers=["[01]", "5", "7"])
        assert adaptation.plan["1.lhuc"].layer == "[01]"


def test_wrapped_models_are_extended_and_merged_inside():
    model = network()
    wrapped = nn.DataParallel(model)
    adaptation = ctl.adapt(wrapped, random_weights(model, 1), [ctl.LHUC()])
    assert "1.lhuc" in model.state_dict()
    assert list(adaptation.merged().state_dict()) == list(network().state_dict())


def test_a_contradiction_leaves_the_model_as_it_was():
    model = network()
    with pytest.raises(ctl.PlanError, match=r"NormAdaptation and LHUC both choose the frozen of '1\.weight'"):
        ctl.adapt(model, random_weights(model, 1), [ctl.LHUC(), ctl.NormAdaptation(statistics="source")])
    assert list(model.state_dict()) == list(network().state_dict())
    assert not any(module._forward_hooks for module in model.modules())


NORMED = [
    (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), (3, 2, 6, 6)),
    (nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), (3, 2, 6, 6)),
    (nn.Linear(5, 4), nn.LayerNorm(4), (3, 5)),
    (nn.Linear(5, 4), nn.RMSNorm(4), (3, 5)),
    (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False), (3, 2, 6)),
]


@pytest.mark.parametrize(("weight", "norm", "shape"), NORMED, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("training", [False, True])
def test_folded_into_a_norm_it_is_the_scaled_output(weight, norm, shape, training):
    """Values, gradients of amplitudes, weights and inputs; no activation is kept for the amplitudes."""
    model = nn.Sequential(nn.Sequential(copy.deepcopy(weight), copy.deepcopy(norm)), nn.Flatten(), nn.LazyLinear(2))
    model.eval()(torch.zeros(shape))
    ctl.adapt(model, copy.deepcopy(model), [ctl.LHUC(freeze=False)])
    model.train(training)
    inner, amplitudes = model[0][1], model[0][1].lhuc
    with torch.no_grad():
        amplitudes.copy_(torch.tensor([-1.0, 0.5, 0.0, 2.0]))
    x = torch.randn(shape, requires_grad=True)
    bare = copy.deepcopy(model)
    plain = copy.deepcopy(norm).train(training)
    factor = amplitudes.detach().clone().requires_grad_()
    dims = [1, -1] + [1] * (len(shape) - 2)
    expected = bare[2](bare[1](plain(bare[0][0](x)) * (2 * torch.sigmoid(factor)).view(dims)))
    wanted = torch.autograd.grad(expected.square().sum(), [x, factor, *plain.parameters()])
    found = model(x)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(
        found.square().sum(), [x, amplitudes, *(inner.get_parameter(n) for n, _ in plain.named_parameters())]
    )
    for one, other in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "weight" not in vars(inner)
    assert "bias" not in vars(inner)


def test_after_an_error_the_weights_are_the_modules_own():
    """A batch of a wrong size must not leave scaled weights behind."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), nn.Linear(3, 2))
    ctl.adapt(model, copy.deepcopy(model), [ctl.LHUC(on=("0.1",))])
    with pytest.raises(RuntimeError, match="shape"):
        model[0][1](torch.zeros(2, 5))
    assert model[0][1].weight is model[0][1].get_parameter("weight")
