"""Reading source weights: whatever they are wrapped in, safely, and nothing dropped in silence."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import conservtl as ctl
from conservtl.source.read import read_source
from conservtl.source.structure import check_structure
from conservtl.testing import models, state_dicts

ROOT = Path(__file__).resolve().parents[3]
RESNET = ROOT / "shared" / "data" / "weights" / "resnet20-12fca82f.th"


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def saved():
    generator = torch.Generator().manual_seed(1)
    state = network().state_dict()
    return {
        k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else torch.tensor(7)
        for k, v in state.items()
    }


def adapted_from(source, model=None):
    model = network() if model is None else model
    return ctl.adapt(model, source)


def holds(adaptation, expected):
    state = adaptation.model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


class TestFiles:
    @pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.th", "a.bin", "a.ckpt", "a"])
    @pytest.mark.parametrize("as_text", [True, False])
    def test_torch_files(self, tmp_path, name, as_text):
        torch.save({"state_dict": saved(), "epoch": 3}, tmp_path / name)
        path = tmp_path / name
        assert holds(adapted_from(str(path) if as_text else path), saved())

    def test_safetensors(self, tmp_path):
        save_file(saved(), tmp_path / "a.safetensors")
        assert holds(adapted_from(tmp_path / "a.safetensors"), saved())

    def test_missing_names_those_near(self, tmp_path):
        for name in ("resnet18.pt", "resnet20.pt", "notes.txt"):
            (tmp_path / name).touch()
        with pytest.raises(
            ctl.SourceError, match=r"resnet19\.pt' is not a file\. Did you mean 'resnet(18|20)\.pt' or 'resnet"
        ) as e:
            adapted_from(tmp_path / "resnet19.pt")
        assert "notes" not in str(e.value)
        with pytest.raises(ctl.SourceError, match=r"is not a file\. Give"):
            adapted_from(tmp_path / "no_such_folder" / "a.pt")
        with pytest.raises(ctl.SourceError, match="is not a file"):
            adapted_from(tmp_path)

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
    @pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
    def test_unreadable(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ctl.SourceError, match=r"a\.(pt|safetensors)' cannot be read as weights: .+"):
            adapted_from(tmp_path / name)

    def test_a_truncated_file(self, tmp_path):
        torch.save(saved(), tmp_path / "a.pt")
        whole = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ctl.SourceError, match="cannot be read"):
            adapted_from(tmp_path / "a.pt")

    def test_nothing_in_a_file_is_executed(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        torch.save({"state_dict": saved(), "extra": Attack()}, tmp_path / "a.pt")
        with pytest.raises(ctl.SourceError, match="code would have to be executed"):
            adapted_from(tmp_path / "a.pt")
        (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack()))
        with pytest.raises(ctl.SourceError, match="code would have to be executed"):
            adapted_from(tmp_path / "b.pt")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("zipped", [True, False])
    def test_the_class_of_a_settings_object_is_named(self, tmp_path, zipped):
        entries = {"model": saved(), "args": Namespace(lr=1)}
        torch.save(entries, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ctl.SourceError, match=r"it holds an object of argparse\.Namespace, whose code"):
            adapted_from(tmp_path / "a.pt")

    def test_a_whole_model_is_refused(self, tmp_path):
        torch.save(network(), tmp_path / "a.pt")
        with pytest.raises(ctl.SourceError, match="Save the state dict alone"):
            adapted_from(tmp_path / "a.pt")

    def test_not_a_dictionary(self, tmp_path):
        torch.save([torch.zeros(2)], tmp_path / "a.pt")
        with pytest.raises(ctl.SourceError, match="holds a list; a state dict is needed"):
            adapted_from(tmp_path / "a.pt")

    def test_an_error_without_words(self, tmp_path, monkeypatch):
        (tmp_path / "a.pt").touch()

        def fail(*args, **kwargs):
            raise EOFError

        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(ctl.SourceError, match="cannot be read as weights: EOFError"):
            adapted_from(tmp_path / "a.pt")

    @pytest.mark.skipif(not RESNET.is_file(), reason=f"{RESNET} is not here")
    def test_as_found_in_the_wild(self):
        """Wrapped in state_dict, prefixed module., best_prec1 beside; saved on a GPU."""
        from conservtl.tasks.vision.cifar_resnet import CifarResNet

        model = CifarResNet(depth=20, classes=10)
        adaptation = ctl.adapt(model, RESNET, [ctl.LayerTransfer(layers=1.0, freeze=False), ctl.L2SP()])
        raw = torch.load(RESNET, map_location="cpu", weights_only=True)["state_dict"]
        state = model.state_dict()
        assert all(torch.equal(state[name.removeprefix("module.")], tensor) for name, tensor in raw.items())
        assert not adaptation.transfer.fresh
        assert not adaptation.transfer.unused
        assert "best_prec1" in str(adaptation.transfer)
        assert len(adaptation.plan.layers) == 11


class TestWrappings:
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
    @pytest.mark.parametrize(
        "wrapper", [(), ("state_dict",), ("model",), ("model_state_dict",), ("model", "state_dict")]
    )
    def test_loads_whatever_the_prefix(self, prefix, wrapper):
        """tllib loads with strict=False and throws the result away: a wrong prefix loads nothing."""
        source = {prefix + name: tensor for name, tensor in saved().items()}
        for key in wrapper:
            source = {key: source, "epoch": 3}
        adaptation = adapted_from(source)
        assert holds(adaptation, saved())
        assert adaptation.drift() == dict.fromkeys(adaptation.plan.layers, 0.0)

    def test_says_what_it_did(self):
        source = {"state_dict": {f"module.{k}": v for k, v in saved().items()} | {"note": "x"}, "best_prec1": 91.78}
        notes = str(adapted_from(source).transfer)
        assert "took the entry 'state_dict', ignored best_prec1" in notes
        assert "ignored entries that are not tensors: note" in notes
        assert "stripped the prefix 'module.'" in notes

    def test_a_model_whose_own_names_begin_with_a_prefix(self):
        model = nn.ModuleDict({"module": network()})
        source = {f"module.{name}": tensor for name, tensor in saved().items()}
        assert holds(adapted_from(source, model), source)
        model = nn.ModuleDict({"module": network()})
        assert holds(adapted_from({f"module.{name}": t for name, t in source.items()}, model), source)

    def test_two_entries_for_one_tensor(self):
        """Under the prefix that fits less, they are left and reported; where both claim a name, refused."""
        prefixed = {f"module.{name}": tensor + 1 for name, tensor in saved().items()}
        adaptation = adapted_from({**saved(), **prefixed})
        assert holds(adaptation, saved())
        assert set(adaptation.transfer.unused) == set(prefixed)
        with pytest.raises(ctl.SourceError, match=r"'0\.bias' and 'module\.0\.bias' both mean '0\.bias'"):
            adapted_from({"0.bias": saved()["0.bias"], **prefixed})

    @pytest.mark.parametrize("prefix", ["net_", "encoder.module_"])
    def test_nothing_loaded_at_all_is_an_error(self, prefix):
        source = {prefix + name: tensor for name, tensor in saved().items()}
        with pytest.raises(ctl.SourceError, match=rf"nothing would be loaded.*'{prefix}0\.bias'.*'0\.bias'"):
            adapted_from(source)

    @pytest.mark.parametrize("source", [{}, {"epoch": 3}, {"state_dict": {}}, {"model": None}])
    def test_no_tensors(self, source):
        with pytest.raises(ctl.SourceError, match="holds no tensors"):
            adapted_from(source)

    @pytest.mark.parametrize("source", [None, 3, [torch.zeros(2)]])
    def test_another_type(self, source):
        with pytest.raises(ctl.SourceError, match=r"source must be a path, a state dict or a torch\.nn\.Module"):
            adapted_from(source)

    def test_wrapped_models(self):
        source = network()
        source.load_state_dict(saved())
        for wrapped in (source, nn.DataParallel(source), torch.compile(source, backend="eager")):
            assert holds(adapted_from(wrapped), saved())

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_reading_changes_nothing(self, data):
        """The dictionary handed in keeps its entries, and its tensors are not the model's."""
        model, _ = data.draw(models())
        weights = data.draw(state_dicts(model, partial=False))
        keys = list(weights.saved)
        ctl.adapt(model, weights.saved)
        assert list(weights.saved) == keys
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {tensor.data_ptr() for tensor in read_source(weights.saved).tensors.values()}


class TestPartial:
    def test_what_is_missing_is_fresh_with_the_reason(self):
        source = {name: tensor for name, tensor in saved().items() if not name.startswith("2")}
        adaptation = adapted_from({**source, "extra.weight": torch.zeros(2)})
        assert adaptation.transfer.fresh == dict.fromkeys(["2.weight", "2.bias"], "missing in the source")
        assert adaptation.transfer.unused == ("extra.weight",)
        assert set(adaptation.transfer.copied) == set(source)
        assert "unused extra.weight" in str(adaptation.transfer)

    def test_tied_under_either_name(self):
        def tied():
            model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
            model["out"].weight = model["embed"].weight
            return model

        value = torch.arange(12.0).reshape(4, 3)
        for names in (["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"]):
            adaptation = adapted_from(dict.fromkeys(names, value), tied())
            assert torch.equal(adaptation.model["embed"].weight, value)
            assert not adaptation.transfer.unused
            assert not adaptation.transfer.fresh

    def test_tied_here_and_not_in_the_source(self):
        """The first name's value is taken, and the other is reported as unused."""
        model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
        model["out"].weight = model["embed"].weight
        adaptation = adapted_from({"embed.weight": torch.zeros(4, 3), "out.weight": torch.ones(4, 3)}, model)
        assert not model["out"].weight.any()
        assert adaptation.transfer.unused == ("out.weight",)


class TestFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
    def test_nan_and_infinity_are_named(self, value, name):
        source = saved()
        source[name].view(-1)[0] = value
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ctl.SourceError, match=rf"tensor '{name}' holds 1 value that are NaN or infinite"):
            adapted_from(source, model)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_masks_are_infinite_by_design(self):
        def masked():
            model = network()
            model.register_buffer("mask", torch.full((2, 2), -torch.inf))
            return model

        assert "mask" in adapted_from(masked().state_dict(), masked()).transfer.copied


class TestStructure:
    def conv(self, **options):
        return nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stride": 2}, r"stride \(2, 2\) here, \(1, 1\)"),
            ({"dilation": 2}, "dilation"),
            ({"groups": 2}, "groups 2 here"),
        ],
    )
    def test_a_layer_that_differs(self, options, message):
        with pytest.raises(ctl.SourceError, match=rf"layer '0': {message}.*allow=\['0'\]"):
            ctl.adapt(self.conv(**options), self.conv())

    def test_a_frozen_batch_norm_computes_as_the_sources(self):
        """With the source's values, in eval mode."""
        misc = pytest.importorskip("torchvision").ops.misc
        torch.manual_seed(0)
        source = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        source(torch.randn(4, 1, 3, 3) * 3 + 1)
        model = nn.Sequential(nn.Conv2d(1, 2, 1), misc.FrozenBatchNorm2d(2))
        ctl.adapt(model, source.eval())
        x = torch.randn(2, 1, 3, 3)
        torch.testing.assert_close(model(x), source(x))

    def test_a_norm_of_another_kind(self):
        model = self.conv()
        model[1] = nn.GroupNorm(2, 4)
        with pytest.raises(ctl.SourceError, match="layer '1': norm GroupNorm here, BatchNorm2d in the source"):
            ctl.adapt(model, self.conv())
        other = self.conv()
        other[1] = nn.GroupNorm(4, 4)
        with pytest.raises(ctl.SourceError, match="layer '1': num_groups 2 here, 4"):
            ctl.adapt(model, other)
        model[1] = nn.SyncBatchNorm(4)
        ctl.adapt(model, self.conv())  # computes what a batch norm does

    def test_a_layer_that_is_missing(self):
        source = self.conv()
        source.add_module("4", nn.Linear(2, 2))
        with pytest.raises(ctl.SourceError, match=r"no layer '4', which the source has \(Linear\)"):
            ctl.adapt(self.conv(), source)
        source = self.conv()
        source[1] = nn.BatchNorm2d(4, affine=False)
        model = self.conv()
        model[1] = nn.Identity()
        with pytest.raises(ctl.SourceError, match="layer '1'"):
            ctl.adapt(model, source)

    @pytest.mark.parametrize("glob", ["0", "*"])
    def test_allowed_by_name(self, glob):
        model = self.conv(stride=2)
        ctl.adapt(model, self.conv(), allow=[glob])
        with pytest.raises(ctl.SourceError):
            ctl.adapt(model, self.conv(), allow=["1", "3"])

    def test_more_layers_and_other_labels_are_fine(self):
        model = self.conv()
        model[3] = nn.Linear(4, 7)
        model.add_module("4", nn.Linear(7, 7))
        fresh = ctl.adapt(model, self.conv()).transfer.fresh
        assert set(fresh) == {"3.weight", "3.bias", "4.weight", "4.bias"}

    def test_a_layer_shared_here_and_not_in_the_source(self):
        def pair():
            return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

        shared = pair()
        shared["b"] = shared["a"]
        check_structure(shared, pair())
        assert ctl.adapt(shared, pair()).transfer.unused == ("b.weight", "b.bias")
