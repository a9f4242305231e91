"""Settings that shards (FSDP2) cannot serve are refused before training, however they were asked for."""

from __future__ import annotations

import os
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.engine.distribution import plain_environment, shards


class Kind(Enum):
    """Accelerate's names of distributions."""

    MULTI_CPU = "MULTI_CPU"


def accelerator(scaler=None, processes=2):
    return SimpleNamespace(distributed_type=Kind.MULTI_CPU, num_processes=processes, scaler=scaler)


class Dropping(nn.Module):
    """Blocks of which a share is left out in training, as torchaudio's transformers do it."""

    def __init__(self, share):
        super().__init__()
        self.layer_drop = share
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        for block in self.blocks:
            if not (self.training and torch.rand(()) < self.layer_drop):
                inputs = inputs + block(inputs)
        return self.head(inputs)


@pytest.fixture(params=["said", "configured"])
def asked(request, monkeypatch):
    """FSDP2, asked for by the settings or by what ``accelerate launch`` was configured for."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if request.param == "configured":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    return {"distributed": "fsdp2" if request.param == "said" else "auto"}


def test_a_plain_model_is_sharded(asked):
    assert shards(ctl.Training(**asked), accelerator(), Dropping(0.0))
    assert not shards(ctl.Training(distributed="ddp"), accelerator(object()), Dropping(0.5))


def test_fp16_is_refused(asked):
    with pytest.raises(ctl.SpecError, match=r"precision is fp16, which fsdp2 does not support\. Set it to bf16"):
        shards(ctl.Training(**asked), accelerator(scaler=object()), Dropping(0.0))


def test_compile_is_refused(asked):
    with pytest.raises(ctl.SpecError, match=r"compile is set, which fsdp2 does not support\. Leave it out"):
        shards(ctl.Training(compile=True, **asked), accelerator(), Dropping(0.0))


def test_layers_left_out_at_random_are_refused(asked):
    message = r"its module 'encoder' leaves layers out at random \(layer_drop is 0\.1\)\. Set it to 0, or use ddp"
    with pytest.raises(ctl.SpecError, match=message):
        shards(ctl.Training(**asked), accelerator(), nn.ModuleDict({"encoder": Dropping(0.1)}))


@pytest.mark.parametrize("field", ["layerdrop", "encoder_layerdrop"])
def test_models_of_transformers_are_refused_by_their_config(asked, field):
    model = Dropping(0.0)
    model.config = SimpleNamespace(**{field: 0.05})
    with pytest.raises(ctl.SpecError, match=rf"Dropping leaves layers out at random \({field} is 0\.05\)"):
        shards(ctl.Training(**asked), accelerator(), model)


def test_wav2vec2_is_refused_and_not_without_layerdrop(asked):
    """Its default is to leave out a tenth of its layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"conv_dim": (4,), "conv_kernel": (3,), "conv_stride": (2,), "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1}
    for share in (0.1, 0.0):
        model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(layerdrop=share, **sizes))
        if share:
            with pytest.raises(ctl.SpecError, match=r"Wav2Vec2Model leaves layers out at random \(layerdrop is 0\.1\)"):
                shards(ctl.Training(**asked), accelerator(), model)
        else:
            assert shards(ctl.Training(**asked), accelerator(), model)


def test_fit_refuses_before_the_first_step(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    adaptation = ctl.adapt(Dropping(0.2), Dropping(0.2), [])
    weights = {name: tensor.clone() for name, tensor in adaptation.model.state_dict().items()}
    training = ctl.Training(epochs=1, device="cpu", distributed="fsdp2")
    with pytest.raises(ctl.SpecError, match="leaves layers out at random"):
        ctl.fit(adaptation, (torch.randn(8, 4), torch.arange(8) % 2), training=training)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adaptation.model.state_dict().items())


def test_processes_that_nobody_started_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ctl.SpecError, match=r"distributed is ddp, which takes processes that a launcher starts"):
        shards(ctl.Training(distributed="ddp"), accelerator(), Dropping(0.0))


def test_another_kind_of_distribution_is_refused(asked):
    other = SimpleNamespace(distributed_type=SimpleNamespace(value="XLA"), num_processes=2, scaler=None)
    if asked["distributed"] == "auto":
        assert not shards(ctl.Training(**asked), other, Dropping(0.0))
    else:
        with pytest.raises(ctl.SpecError, match=r"distributed is fsdp2, but the accelerator is of type XLA"):
            shards(ctl.Training(**asked), other, Dropping(0.0))


def test_what_accelerate_launch_says_is_hidden_for_a_while_or_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with plain_environment():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with (
        pytest.raises(ctl.SpecError, match="configured for DeepSpeed, which fit does not support"),
        plain_environment(),
    ):
        pass
