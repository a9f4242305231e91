"""State dicts that torch migrates: loaded as ``load_state_dict(strict=True)`` loads them, into adapt as well."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import conservtl as ctl
from conservtl.testing.weights import random_weights


def body(norm):
    """A network with a weight norm, old or new, on two of its layers."""
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Conv1d(2, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(16, 5)), nn.Linear(5, 2))


@pytest.fixture
def old_norm():
    def make(module):
        with pytest.warns(FutureWarning, match="weight_norm"):
            return nn.utils.weight_norm(module)

    return make


def loaded(model, state):
    """Reference: torch's own strict loading, on a copy."""
    reference = copy.deepcopy(model)
    reference.load_state_dict(state, strict=True)
    return reference.state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class TestWeightNorm:
    def test_old_names_into_a_parametrization(self, old_norm):
        state = random_weights(body(old_norm), 1)
        assert "0.weight_g" in state
        model = body(parametrizations.weight_norm)
        expected = loaded(model, state)
        adaptation = ctl.adapt(model, state, [ctl.L2SP()])
        assert same(model.state_dict(), expected)
        assert not adaptation.transfer.fresh
        assert not adaptation.transfer.unused
        assert "own hooks for loading" in str(adaptation.plan)
        assert adaptation.drift() == dict.fromkeys(adaptation.plan.layers, 0.0)

    def test_and_back(self, old_norm):
        """Torch has no hook in this direction; the values are those of the same product g v / |v|."""
        source = body(parametrizations.weight_norm)
        source.load_state_dict(random_weights(source, 1))
        model = body(old_norm)
        adaptation = ctl.adapt(model, source.state_dict())
        assert not adaptation.transfer.fresh
        x = torch.randn(3, 2, 6)
        torch.testing.assert_close(model(x), source(x))

    @pytest.mark.parametrize("wrapper", ["module.", "model."])
    def test_under_a_prefix(self, old_norm, wrapper):
        state = random_weights(body(old_norm), 1)
        model = body(parametrizations.weight_norm)
        expected = loaded(model, state)
        ctl.adapt(model, {"state_dict": {wrapper + name: tensor for name, tensor in state.items()}})
        assert same(model.state_dict(), expected)

    def test_from_a_model(self, old_norm):
        """The term on features compares with the source's function, under the model's names."""
        source, model = body(old_norm), body(parametrizations.weight_norm)
        source.load_state_dict(random_weights(source, 1))
        x = torch.randn(3, 2, 6)
        adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(alpha=1.0)], example=x)
        torch.testing.assert_close(model(x), source(x))
        assert not adaptation.transfer.fresh
        assert adaptation.loss(torch.zeros(()), model(x), x).item() == pytest.approx(0.0, abs=1e-9)

    def test_and_back_from_a_model(self, old_norm):
        source, model = body(parametrizations.weight_norm), body(old_norm)
        source.load_state_dict(random_weights(source, 1))
        x = torch.randn(3, 2, 6)
        adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(alpha=1.0)], example=x)
        assert not adaptation.transfer.fresh
        torch.testing.assert_close(model(x), source(x))
        assert adaptation.loss(torch.zeros(()), model(x), x).item() == pytest.approx(0.0, abs=1e-9)

    def test_another_structure_is_refused_all_the_same(self, old_norm):
        source = body(old_norm)
        model = body(parametrizations.weight_norm)
        model[0].stride = (2,)
        with pytest.raises(ctl.SourceError, match=r"layer '0': stride \(2,\) here, \(1,\)"):
            ctl.adapt(model, source)

    def test_after_a_forward_pass(self, old_norm):
        """The product is then no leaf, which cannot be copied."""
        model = body(parametrizations.weight_norm)
        model.add_module("5", old_norm(nn.Linear(2, 2)))
        model(torch.randn(3, 2, 6))
        state = random_weights(body(old_norm), 1)
        adaptation = ctl.adapt(model, state)
        assert set(adaptation.transfer.fresh) == {"5.weight_g", "5.weight_v", "5.bias"}


class Renamed(nn.Module):
    """A module that was called ``old`` before, as a user's hook knows."""

    def __init__(self, how):
        super().__init__()
        self.new = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.how = how
        if how == "hook":
            self._register_load_state_dict_pre_hook(self.rename)
        if how == "public hook":
            self.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: self.rename(state, prefix))

    def rename(self, state, prefix, *_):
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace("old.", "new.")] = 2 * state.pop(name)

    def _load_from_state_dict(self, state, prefix, *rest):
        if self.how == "override":
            self.rename(state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)

    def load_state_dict(self, state, strict=True):
        if self.how == "whole":
            state = dict(state)
            self.rename(state, "")
        return super().load_state_dict(state, strict)

    def forward(self, x):
        return self.head(self.new(x))


@pytest.mark.parametrize("how", ["hook", "public hook", "override", "whole"])
@pytest.mark.parametrize("inside", [False, True])
def test_hooks_of_a_users_own(how, inside):
    """They rename, and change values; inside another module too, where they see a prefix."""
    if inside and how == "whole":
        pytest.skip("torch calls load_state_dict of the outermost module only")
    model = nn.Sequential(nn.Linear(3, 3), Renamed(how)) if inside else Renamed(how)
    state = {name.replace("new.", "old."): tensor for name, tensor in random_weights(model, 1).items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    expected = loaded(model, state)
    held = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    adaptation = ctl.adapt(model, state, [ctl.L2SP(alpha=1.0)])
    assert same(model.state_dict(), expected)
    assert same(state, kept)
    assert not adaptation.transfer.fresh
    assert not adaptation.transfer.unused
    assert adaptation.penalty().item() == 0
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == held


def test_a_hook_that_fails_is_named_and_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("not there"))
    state = random_weights(model, 1)
    adaptation = ctl.adapt(model, state)
    assert same(model.state_dict(), state)
    assert "hooks for loading stopped (KeyError: 'not there')" in str(adaptation.plan)


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_hook_that_writes_into_tensors_writes_into_copies(prefix):
    """Once, whatever prefixes are tried; the dictionary that was handed in, or the source model, stays as it is."""
    model = nn.ModuleDict({"module": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    model["out"].register_load_state_dict_pre_hook(lambda _, state, start, *__: state[f"{start}weight"].mul_(2))
    plain = random_weights(model, 1)
    kept = {name: tensor.clone() for name, tensor in plain.items()}
    ctl.adapt(model, {prefix + name: tensor for name, tensor in plain.items()})
    assert torch.equal(model["out"].weight, 2 * kept["out.weight"])
    assert torch.equal(model["module"].weight, kept["module.weight"])
    assert same(plain, kept)
    source = nn.ModuleDict({"module": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    held = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    ctl.adapt(model, source)
    assert same(source.state_dict(), held)
    assert torch.equal(model["out"].weight, 2 * held["out.weight"])


class Joined(nn.Module):
    """Query, key and value in one layer; earlier versions had three, as its hook knows."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, 2)
        self.register_load_state_dict_pre_hook(self.join)

    @staticmethod
    def join(module, state, prefix, *_):
        if f"{prefix}q.weight" in state:
            for key in ("weight", "bias"):
                state[f"{prefix}qkv.{key}"] = torch.cat([state.pop(f"{prefix}{one}.{key}") for one in "qkv"])

    def forward(self, x):
        return self.out(self.qkv(x))


class Apart(nn.Module):
    """The earlier version of ``Joined``."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(12, 2))

    def forward(self, x):
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], dim=1))


def test_layers_that_a_hook_joins_are_no_difference_in_structure():
    source, model, x = Apart(), Joined(), torch.randn(3, 4)
    expected = loaded(model, source.state_dict())
    adaptation = ctl.adapt(model, source, [ctl.L2SP(), ctl.OutputConservation(form="squared")])
    assert same(model.state_dict(), expected)
    assert adaptation.loss(torch.zeros(()), model(x), x).item() == pytest.approx(0.0, abs=1e-9)
    source.add_module("norm", nn.InstanceNorm1d(4))
    with pytest.raises(ctl.SourceError, match="the model has no layer 'norm'"):
        ctl.adapt(Joined(), source)


def test_tensors_without_values_pass():
    model = Renamed("hook")
    plain = random_weights(model, 1)
    old = {name.replace("new.", "old."): tensor for name, tensor in plain.items()}
    ctl.adapt(model, old | {"projector": torch.zeros(2, device="meta"), "more": torch.eye(2).to_sparse()})
    assert torch.equal(model.new.weight, 2 * plain["new.weight"])
    with pytest.raises(ctl.SourceError, match=r"'head\.bias' must hold values .* meta"):
        ctl.adapt(model, old | {"head.bias": torch.zeros(2, device="meta")})


def test_a_method_for_loading_that_never_loads():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.load_state_dict = lambda state: None
    state = random_weights(model, 1)
    ctl.adapt(model, state)
    assert same(model.state_dict(), state)


def test_what_a_hook_drops_stays_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def drop(_, state, *__):
        for name in [name for name in state if name.startswith("1.")]:
            del state[name]

    model.register_load_state_dict_pre_hook(drop)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = random_weights(model, 1)
    adaptation = ctl.adapt(model, state)
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[0].weight, state["0.weight"])
    assert adaptation.transfer.fresh == dict.fromkeys(["1.weight", "1.bias"], "missing in the source")


def test_scalars_of_the_first_versions_of_torch():
    """A scale of shape (1,) was how a scalar was saved."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    state = random_weights(model, 1)
    state |= {"scale": torch.tensor([3.0]), "1.num_batches_tracked": torch.tensor([7])}
    expected = loaded(model, state)
    assert not ctl.adapt(model, state).transfer.fresh
    assert same(model.state_dict(), expected)
    assert model.scale == 3


def test_tensors_that_no_module_claims_are_reported():
    model = Renamed("hook")
    state = random_weights(model, 1) | {"projector.weight": torch.zeros(2, 2), "new.more": torch.zeros(3)}
    adaptation = ctl.adapt(model, state)
    assert set(adaptation.transfer.unused) == {"projector.weight", "new.more"}


def test_other_labels_pass_through_hooks_too():
    model = Renamed("hook")
    state = {name.replace("new.", "old."): tensor for name, tensor in random_weights(model, 1).items()}
    state |= {"head.weight": torch.zeros(7, 4), "head.bias": torch.zeros(7)}
    fresh = ctl.adapt(model, state).transfer.fresh
    assert fresh == {
        "head.weight": "shape differs: (2, 4) here, (7, 4) in the source",
        "head.bias": "shape differs: (2,) here, (7,) in the source",
    }


class TestTorchvision:
    @pytest.fixture(autouse=True)
    def torchvision(self):
        return pytest.importorskip("torchvision")

    def test_detection_before_0_13(self):
        """The feature pyramid's and the proposal network's convolutions had shorter names."""
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as build

        model = build(weights=None, weights_backbone=None, num_classes=3)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        old = {}
        for name, tensor in state.items():
            short = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
            if "fpn." in name:
                short = short.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
            old[short] = tensor + 1
        assert set(old) != set(state)
        expected = loaded(model, old)
        adaptation = ctl.adapt(model, old)
        assert same(model.state_dict(), expected)
        assert not adaptation.transfer.fresh

    def test_old_mlp_blocks_of_a_vision_transformer(self):
        from torchvision.models import VisionTransformer

        model = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
        state = random_weights(model, 1)
        old = {
            name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
            for name, tensor in state.items()
        }
        expected = loaded(model, old)
        assert not ctl.adapt(model, old).transfer.fresh
        assert same(model.state_dict(), expected)

    def test_a_class_that_needs_to_know_the_version(self, tmp_path):
        """MNASNet loads with the version that torch.save keeps, and says so where safetensors lose it."""
        from safetensors.torch import save_file
        from torchvision.models import mnasnet0_5

        source, model = mnasnet0_5(num_classes=2), mnasnet0_5(num_classes=2)
        torch.save(source.state_dict(), tmp_path / "a.pt")
        save_file(source.state_dict(), tmp_path / "a.safetensors")
        for name in ("a.pt", "a.safetensors"):
            adaptation = ctl.adapt(model, tmp_path / name)
            assert same(model.state_dict(), source.state_dict())
            assert ("stopped (ValueError" in str(adaptation.plan)) is name.endswith("safetensors")
