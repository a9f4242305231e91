"""LayerFeatures of each layer are its outputs, pooled; the shift of norms is what it says."""

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.data import Examples
from conservtl.experiments.advice.layer_features import _pooling, features_of, statistics_shift
from conservtl.layers import Layer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def examples(n=7):
    generator = torch.Generator().manual_seed(1)
    return Examples(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 2, tuple(map(str, range(n))))


def test_each_layer_is_pooled_over_positions_whatever_the_batches():
    model, data = network().eval(), examples()
    layers = ctl.find_layers(model)
    found = features_of(model, data, layers, batch_size=3)
    with torch.no_grad():
        first = model[1](model[0](data.inputs))
        expected = [first.mean((2, 3)), model[3](first.relu()).mean((2, 3)), model(data.inputs)]
    assert list(found.layers) == [layer.name for layer in layers]
    for got, want in zip(found.layers.values(), expected, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(found.outputs, expected[-1])
    assert torch.equal(found.labels, data.labels)


def test_a_transformer_has_its_channels_last():
    model = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    data = Examples(torch.randn(4, 6, 5), torch.zeros(4, dtype=torch.long), tuple("abcd"))
    last = features_of(model, data, ctl.find_layers(model)).layers["1"]
    with torch.no_grad():
        torch.testing.assert_close(last, model(data.inputs).mean(1))


def test_the_model_is_left_as_found():
    model = network().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features_of(model, examples(), ctl.find_layers(model))
    statistics_shift(model, examples())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model[:3]] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_statistics_that_were_learned_on_the_data_have_no_shift():
    """One standard deviation of the mean is a shift of one."""
    model, data = network(), examples(64)
    with torch.no_grad():
        entering = model[0](data.inputs).double()
        model[1].running_mean.copy_(entering.mean((0, 2, 3)))
        model[1].running_var.copy_(entering.var((0, 2, 3), unbiased=False))
    assert statistics_shift(model, data, batch_size=10) == pytest.approx(0, abs=1e-4)
    model[1].running_mean += (model[1].running_var + model[1].eps).sqrt()
    assert statistics_shift(model, data) == pytest.approx(1, abs=1e-3)
    assert statistics_shift(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), data) is None


class Branches(nn.Module):
    """A norm that never runs, and a layer that returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused, self.last = nn.BatchNorm1d(3), nn.BatchNorm1d(3), Named()

    def forward(self, x):
        return self.last(self.norm(x))["out"]


class Named(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return {"out": super().forward(x), "mean": x.mean()}


def test_a_norm_that_never_runs_has_no_shift():
    """The other one's: mean 2 and deviation 0 against 0 and 1 give sqrt(4 + 1)."""
    data = Examples(torch.full((8, 3), 2.0), torch.arange(8) % 2, tuple("abcdefgh"))
    found = statistics_shift(Branches(), data)
    assert found == pytest.approx(5**0.5, rel=1e-4)


def test_the_first_tensor_of_a_layers_outputs_is_pooled():
    model, x = Branches().eval(), torch.randn(5, 3)
    with _pooling(model, [Layer("last", (), ("last",))]) as caught:
        model(x)
    assert torch.allclose(caught["last"], model(x))
    with _pooling(model, [Layer("bare", (), ())]) as caught:
        model(x)
    assert caught == {}
    with (
        pytest.raises(ctl.SelectorError, match="the model has no layer 'x'"),
        _pooling(model, [Layer("x", (), ("x",))]),
    ):
        pass
