"""Tensors without ordinary values, and wrappers of averaged weights: one sentence each, or accepted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import conservtl as ctl
from conservtl.layers import unwrap
from conservtl.testing.weights import random_weights


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


KINDS = {
    "quantised": (quantised, r"is quantised or of integers \(qint8\)\. Take the weights from before quantisation"),
    "int8": (lambda t: (10 * t).to(torch.int8), r"of integers \(int8\)"),
    "uint8": (lambda t: t.abs().to(torch.uint8), r"of integers \(uint8\)"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), r"is float8_e4m3fn\. Convert it, with its scale, to float32"),
    "float8 scales": (
        lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "is float8_e8m0fnu",
    ),
    "meta": (lambda t: t.to("meta"), r"is on the meta device, without values\. Load or initialise"),
    "sparse": (lambda t: t.to_sparse(), r"is sparse \(sparse_coo\)\. Make it dense"),
    "compressed": (lambda t: t.to_sparse_csr(), r"is sparse \(sparse_csr\)"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), "is a nested tensor"),
    "complex": (lambda t: t.to(torch.complex64), r"is complex and the model's is float32"),
}


@pytest.mark.filterwarnings("ignore")  # prototypes of torch warn when they are made
class TestSource:
    @pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
    def test_refused_before_anything_is_changed(self, make, message):
        model = network()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        source = random_weights(model, 1)
        source["2.weight"] = make(source["2.weight"])
        with pytest.raises(ctl.SourceError, match=rf"'2\.weight' must hold values that can be copied; it .*{message}"):
            ctl.adapt(model, source)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("make", [make for make, _ in KINDS.values()], ids=KINDS)
    def test_elsewhere_they_do_not_matter(self, make):
        model = network()
        source = random_weights(model, 1)
        ctl.adapt(model, source | {"projector": make(torch.rand(3, 2))})
        assert torch.equal(model[2].weight, source["2.weight"])

    def test_a_quantised_model_and_its_file(self, tmp_path):
        source = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
        with pytest.raises(
            ctl.SpecError, match=r"the source model: .*'0' is a quantised Linear\. Adapt the model before"
        ):
            ctl.adapt(network(), source)
        with pytest.raises(ctl.SourceError, match=r"'0\._packed_params\._packed_params' is the packed weight"):
            ctl.adapt(network(), dict(source.state_dict()))

    def test_half_precision_and_integer_buffers_are_ordinary(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        source = {n: t.bfloat16() if t.is_floating_point() else t.int() for n, t in random_weights(model, 1).items()}
        ctl.adapt(model, source)
        assert torch.equal(model[0].weight, source["0.weight"].float())

    def test_complex_values(self):
        """From complex, or from real, values; NaN in them is found."""
        model = nn.ParameterDict({"spectrum": nn.Parameter(torch.zeros(3, dtype=torch.complex64))})
        ctl.adapt(model, {"spectrum": torch.tensor([1 + 2j, 0, 3j])})
        assert model["spectrum"][0] == 1 + 2j
        ctl.adapt(model, {"spectrum": torch.ones(3)})
        assert model["spectrum"][0] == 1
        with pytest.raises(ctl.SourceError, match="holds 1 value that are NaN"):
            ctl.adapt(model, {"spectrum": torch.tensor([1, complex("nan"), 0])})


@pytest.mark.filterwarnings("ignore")
class TestModel:
    @pytest.mark.parametrize("kind", ["int8", "uint8", "float8", "meta", "sparse"])
    def test_refused(self, kind):
        make, message = KINDS[kind]
        model = network()
        model[2].weight = nn.Parameter(make(model[2].weight.detach()), requires_grad=False)
        with pytest.raises(ctl.SpecError, match=rf"the model: .*'2\.weight' .*{message}"):
            ctl.adapt(model, random_weights(network(), 1))

    def test_quantised(self):
        model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
        with pytest.raises(ctl.SpecError, match=r"the model: .*'0' is a quantised Linear"):
            ctl.adapt(model, random_weights(network(), 1))

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = network()
        with pytest.raises(ctl.SpecError, match=r"'0\.weight' is on the meta device"):
            ctl.adapt(model, random_weights(network(), 1))

    def test_lazy(self):
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        with pytest.raises(ctl.SpecError, match=r"'0\.weight' has no shape yet .*Run the model once"):
            ctl.adapt(model, random_weights(network(), 1))
        model(torch.zeros(1, 3))
        ctl.adapt(model, model.state_dict())

    def test_masks_of_bytes_and_whole_numbers_are_ordinary(self):
        model = network()
        model.register_buffer("mask", torch.ones(3, dtype=torch.uint8))
        model.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
        assert ctl.adapt(model, random_weights(network(), 1)).plan["steps"].frozen

    def test_additions_with_an_observer_are_ordinary(self):
        model = network()
        model.add = torch.ao.nn.quantized.FloatFunctional()
        ctl.adapt(model, random_weights(network(), 1))


class ModelEMA(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


class EMA(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.online_model, self.ema_model = model, copy.deepcopy(model)
        self.register_buffer("step", torch.tensor(0))


class SemanticModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


def averaged():
    """Averages of weights of ones and of zeros, in each kind of wrapper."""
    model = network()
    yield AveragedModel(model)
    yield AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    yield ModelEMA(model)
    yield EMA(model)
    try:
        from timm.utils import ModelEmaV2, ModelEmaV3
    except ImportError:
        return
    yield ModelEmaV2(model)
    yield ModelEmaV3(model)


class TestAverages:
    def test_as_the_source(self):
        for wrapper in averaged():
            inner = getattr(wrapper, "ema_model", None) or wrapper.module
            inner.load_state_dict(random_weights(inner, 3))
            for source in (wrapper, nn.DataParallel(wrapper), torch.compile(wrapper, backend="eager")):
                model = network()
                adaptation = ctl.adapt(model, source, [ctl.L2SP()])
                assert all(torch.equal(model.state_dict()[n], t) for n, t in inner.state_dict().items())
                assert not adaptation.transfer.unused

    def test_as_the_model(self):
        wrapper = AveragedModel(network())
        plain = random_weights(network(), 1)
        adaptation = ctl.adapt(wrapper, plain, [ctl.L2SP()])
        assert adaptation.model is wrapper
        assert torch.equal(wrapper.module[0].weight, plain["0.weight"])
        assert adaptation.plan.layers == ("0", "2")

    def test_from_their_file(self, tmp_path):
        wrapper = AveragedModel(network())
        wrapper.update_parameters(network())
        torch.save(wrapper.state_dict(), tmp_path / "a.pt")
        model = network()
        adaptation = ctl.adapt(model, tmp_path / "a.pt")
        assert torch.equal(model[0].weight, wrapper.module[0].weight)
        assert not adaptation.transfer.unused

    def test_other_modules_of_that_shape_are_no_wrappers(self):
        model = SemanticModel(network())
        assert unwrap(model) is model
        assert ctl.adapt(model, ctl.itself(missing=[])).plan.rows[0].name == "module.0.weight"
