"""Weights by name in a spec: read as a path is, and pinned in the spec that a run writes."""

import hashlib

import pytest
import torch
import yaml

import conservtl as ctl
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def weights(speech_fields, tmp_path):
    """A file of weights of the spec's network."""
    model = prepare(parse_spec(speech_fields)).model(3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def named(fields, name):
    return parse_spec({**fields, "source": {**fields["source"], "weights": name}})


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:ResNet18_Weights.DEFAULT",
        "timm:resnet18.a1_in1k",
        "torchaudio:WAV2VEC2_BASE",
        "hf:org/net@main",
        "https://host/net.pth#sha256=0123456789abcdef",
    ],
)
def test_a_name_is_kept_as_it_is(speech_fields, name):
    """Nothing is asked of a library or a server when a spec is read; a path would lose a slash."""
    spec = named(speech_fields, name)
    assert spec.source.weights == name
    assert yaml.safe_load(dump_spec(spec))["source"]["weights"] == name
    assert parse_spec(yaml.safe_load(dump_spec(spec))) == spec


def test_a_url(speech_fields, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    source = obtain_source(prepare(named(speech_fields, f"{weights.as_uri()}#sha256={digest}")))
    expected = torch.load(weights)
    assert all(torch.equal(source.model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_the_spec_of_a_run_names_the_commit(speech_fields, weights, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from safetensors.torch import save_file

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--org--net"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    save_file(torch.load(weights), folder / "snapshots" / COMMIT / "model.safetensors")
    report = run(named(speech_fields, "hf:org/net@main"), tmp_path / "out")
    pinned = f"hf:org/net@{COMMIT}"
    assert load_spec(tmp_path / "out" / "spec.yaml").source.weights == pinned
    assert report["spec"]["source"]["weights"] == pinned


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:org/net", r"must name a revision"),
        ("https://host/net.pth", r"must be the URL of a file with its SHA-256"),
        ("tim:resnet18", r"'tim' is no kind of name"),
    ],
)
def test_a_wrong_name(speech_fields, tmp_path, name, message):
    with pytest.raises(ctl.SourceError, match=message):
        run(named(speech_fields, name), tmp_path / "out")


def test_another_networks_weights_are_named_in_the_message(speech_fields, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    state = torch.load(weights)
    dropped = next(name for name in state if name.endswith("weight"))
    torch.save({name: tensor for name, tensor in state.items() if name != dropped}, weights)
    url = f"{weights.as_uri()}#sha256={hashlib.sha256(weights.read_bytes()).hexdigest()}"
    with pytest.raises(ctl.SourceError, match=rf"source\.weights 'file:///.*' has no tensor '{dropped}'"):
        run(named(speech_fields, url), tmp_path / "out")


def test_half_a_head_is_refused(speech_fields, weights, tmp_path):
    """A body alone runs (``test_headless``); a head without its weight is no head that was ever trained."""
    torch.save({name: tensor for name, tensor in torch.load(weights).items() if name != "head.weight"}, weights)
    with pytest.raises(ctl.SourceError, match=r"'weights\.pt' has no tensor 'head\.weight'"):
        run(named(speech_fields, str(weights)), tmp_path / "out")
