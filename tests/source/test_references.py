"""Weights by the names that their libraries know; downloads come from files and servers on this machine."""

import hashlib
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import conservtl as ctl
from conservtl.source.read import read_source
from conservtl.source.references import reference_of


@pytest.fixture
def home(tmp_path, monkeypatch):
    """torch's folder for downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


def published(folder, state, name="net"):
    """Return the URL of a file of weights, with its hash in its name."""
    torch.save(state, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    path = (folder / "weights").rename(folder / f"{name}-{digest[:8]}.pth")
    return path.as_uri()


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.items()
    }


def holds(model, state, but=()):
    own = model.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in state.items() if name not in but)


class TestUrl:
    @pytest.fixture
    def file(self, tmp_path):
        save_file(nn.Linear(3, 2).state_dict(), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    @pytest.mark.parametrize("digits", [8, 64])
    def test_a_hash_in_the_fragment(self, home, file, capsys, digits):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        source = f"{file.as_uri()}#sha256={digest[:digits]}"
        expected = read_source(file).tensors
        assert ctl.adapt(nn.Linear(3, 2), source).model.weight.equal(expected["weight"])
        place = home / f"model-{digest[:8]}.safetensors"
        assert capsys.readouterr().err == f"conservtl: downloading {source} ({file.stat().st_size} bytes) to {place}\n"
        file.unlink()
        assert read_source(source).tensors["weight"].equal(expected["weight"])  # once is enough
        assert capsys.readouterr().err == ""

    def test_a_hash_in_the_name(self, home, tmp_path):
        url = published(tmp_path, nn.Linear(3, 2).state_dict())
        assert read_source(url).where == f"source {url}"
        assert [path.name for path in home.iterdir()] == [url.rpartition("/")[2]]

    @pytest.mark.parametrize("ending", ["", "#main", "#sha256=123", "#md5=0123456789abcdef"])
    def test_without_a_hash(self, home, file, ending):
        with pytest.raises(ctl.SourceError, match=r"must be the URL of a file with its SHA-256.*#sha256=\.\.\. with"):
            read_source(file.as_uri() + ending)
        assert not home.exists()

    def test_with_another_hash(self, home, file):
        with pytest.raises(ctl.SourceError, match=r"holds another file: invalid hash value.*Correct the hash"):
            read_source(f"{file.as_uri()}#sha256=0123456789abcdef")
        assert not list(home.iterdir())

    def test_a_file_that_was_put_there_must_have_the_hash(self, home, file):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        home.mkdir(parents=True)
        (home / f"model-{digest[:8]}.safetensors").write_bytes(b"other")
        with pytest.raises(ctl.SourceError, match=r"must have the SHA-256 .* it has .* Delete it"):
            read_source(f"{file.as_uri()}#sha256={digest}")

    def test_without_a_network(self, home, tmp_path):
        url = (tmp_path / "net-01234567.pth").as_uri()
        with pytest.raises(ctl.SourceError) as error:
            read_source(url)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith(f"source {url}: {url} cannot be downloaded (URLError:")
        assert message.endswith(f"Download net-01234567.pth on another machine and put it at {home}/net-01234567.pth")
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "put")
        digest = hashlib.sha256((tmp_path / "put").read_bytes()).hexdigest()
        home.mkdir(parents=True, exist_ok=True)
        (tmp_path / "put").rename(home / f"net-{digest[:8]}.pth")
        assert set(read_source(url.replace("01234567", digest[:8])).tensors) == {"weight", "bias"}


class TestTorchvision:
    @pytest.fixture
    def weights(self, tmp_path, monkeypatch):
        models = pytest.importorskip("torchvision.models")
        state = filled(models.squeezenet1_1())
        entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
        monkeypatch.setattr(entry.value, "url", published(tmp_path, state))
        return entry, state

    @pytest.mark.parametrize(
        "named",
        [
            "torchvision:SqueezeNet1_1_Weights.DEFAULT",
            "torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1",
            "SqueezeNet1_1_Weights.DEFAULT",
            None,
        ],
    )
    def test_an_entry(self, home, weights, capsys, named):
        from torchvision.models import squeezenet1_1

        entry, state = weights
        model = squeezenet1_1(num_classes=5)
        adaptation = ctl.adapt(model, named or entry)
        assert adaptation.plan.fresh == ("classifier.1.weight", "classifier.1.bias")
        assert holds(model, state, but=adaptation.plan.fresh)
        assert "downloading torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1 (5.0 MB) to" in capsys.readouterr().err

    def test_default_is_pinned(self):
        pytest.importorskip("torchvision")
        text = "torchvision:ResNet50_Weights.DEFAULT"
        assert str(reference_of(text).pinned()) == "torchvision:ResNet50_Weights.IMAGENET1K_V2"

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("ResNet18_Weights.IMAGENET", r"Did you mean .*'ResNet18_Weights\.IMAGENET1K_V1'"),
            ("resnet18_weights.default", r"Did you mean .*'ResNet18_Weights\.DEFAULT'"),
            ("ResNet18_Weights", r"Did you mean .*'ResNet18_Weights\.DEFAULT'"),
            ("", r"There are "),
        ],
    )
    def test_unknown(self, name, near):
        pytest.importorskip("torchvision")
        with pytest.raises(ctl.SourceError, match=rf"must name an entry of torchvision's weights.*{near}"):
            read_source(f"torchvision:{name}")


class TestTimm:
    @pytest.fixture
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.fixture
    def config(self, timm, tmp_path):
        """A small network's configuration, with the URL of a file."""
        state = filled(timm.create_model("test_resnet"))
        config = timm.get_pretrained_cfg("test_resnet")
        return replace(config, hf_hub_id=None, url=published(tmp_path, state)), state

    @pytest.mark.parametrize("as_dictionary", [True, False])
    def test_a_configuration(self, home, timm, config, capsys, as_dictionary):
        config, state = config
        model = timm.create_model("test_resnet", num_classes=5)
        adaptation = ctl.adapt(model, asdict(config) if as_dictionary else config)
        assert adaptation.plan.fresh == ("fc.weight", "fc.bias")
        assert holds(model, state, but=adaptation.plan.fresh)
        assert "conservtl: downloading timm:test_resnet.r160_in1k (" in capsys.readouterr().err

    def test_a_models_own(self, home, timm, config):
        config, state = config
        model = timm.create_model("test_resnet", pretrained_cfg=config, num_classes=5)
        assert holds(ctl.adapt(model, model.pretrained_cfg).model, state, but=["fc.weight", "fc.bias"])

    def test_a_name(self, home, timm, config, monkeypatch):
        config, state = config
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config if name == "test_resnet" else None)
        source = read_source("timm:test_resnet")
        assert source.where == "source timm:test_resnet.r160_in1k"
        assert holds(source.module, state)

    def test_without_a_network(self, home, timm, config, tmp_path):
        config = replace(config[0], url=(tmp_path / "gone-01234567.pth").as_uri())
        with pytest.raises(ctl.SourceError, match=rf"timm:test_resnet\.r160_in1k.*put it at {home}/gone-01234567\.pth"):
            read_source(config)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnet19", r"must name a network of timm\. Did you mean 'resnet1"),
            ("resnet18.a9_in1k", r"resnet18 has no weights tagged 'a9_in1k'\. Did you mean .*'a1_in1k'"),
            ("test_nothing", r"must name a network of timm"),
        ],
    )
    def test_unknown(self, timm, name, message):
        with pytest.raises(ctl.SourceError, match=message):
            read_source(f"timm:{name}")

    def test_a_network_without_published_weights(self, timm):
        published = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
        name = next(one for one in timm.list_models() if one not in published)
        with pytest.raises(ctl.SourceError, match="must name published weights"):
            read_source(f"timm:{name}")


class TestTorchaudio:
    @pytest.fixture
    def bundle(self, tmp_path, monkeypatch):
        pipelines = pytest.importorskip("torchaudio.pipelines")
        small = {"encoder_embed_dim": 16, "encoder_num_heads": 2, "encoder_num_layers": 1}
        small |= {"encoder_ff_interm_features": 16, "extractor_conv_layer_config": [(16, 10, 5), (16, 8, 4)]}
        small |= {"encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 2}
        bundle = pipelines.WAV2VEC2_BASE
        monkeypatch.setattr(bundle, "_params", {**bundle._params, **small})
        model = pipelines._wav2vec2.utils._get_model("Wav2Vec2", bundle._params)
        state = filled(model)
        monkeypatch.setattr(bundle, "_path", "https://localhost/wav2vec2_small.pth")
        return bundle, state

    @pytest.mark.parametrize("named", ["torchaudio:WAV2VEC2_BASE", "WAV2VEC2_BASE", None])
    def test_a_bundle(self, home, bundle, named):
        bundle, state = bundle
        home.mkdir(parents=True)
        torch.save(state, home / "wav2vec2_small.pth")
        source = read_source(named or bundle)
        assert source.where == "source torchaudio:WAV2VEC2_BASE"
        assert holds(source.module, state)

    def test_without_a_network(self, home, bundle):
        with pytest.raises(ctl.SourceError, match=rf"torchaudio:WAV2VEC2_BASE: .*put it at {home}/wav2vec2_small\.pth"):
            read_source("torchaudio:WAV2VEC2_BASE")

    def test_unknown(self):
        pytest.importorskip("torchaudio")
        with pytest.raises(ctl.SourceError, match=r"must name a bundle of torchaudio\. Did you mean 'WAV2VEC2_BASE'"):
            read_source("torchaudio:WAV2VEC_BASE")


class TestText:
    def test_a_file_wins_over_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save(nn.Linear(3, 2).state_dict(), "WAV2VEC2_BASE")
        assert set(read_source("WAV2VEC2_BASE").tensors) == {"weight", "bias"}

    def test_an_unknown_kind(self):
        with pytest.raises(ctl.SourceError, match=r"'tim' is no kind of name: torchvision, .*Did you mean 'timm'"):
            read_source("tim:resnet18")

    def test_a_drive_is_a_path(self):
        with pytest.raises(ctl.SourceError, match="is not a file"):
            read_source("C:weights.pt")
