"""Recognizers in bf16 and fp16 on a CPU: the network in half precision, CTC in single precision, finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.data import Sequences
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.task import Transcribe

TASK = Transcribe()
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def data_of(shape, factor=1):
    generator = torch.Generator().manual_seed(0)
    lengths = (60, 33, 48, 21)
    return Sequences(
        tuple(torch.randn(factor * length, *shape, generator=generator) for length in lengths),
        tuple(torch.randint(1, 5, (4,), generator=generator) for _ in lengths),
        tuple(map(str, lengths)),
        (),
        tuple(length / 10 for length in lengths),
    )


def make(name):
    torch.manual_seed(0)
    if name == "conformer":
        return ConformerCTC(6, 5, ConformerArgs(width=16, blocks=2, heads=2, subsampling=2, dropout=0.0)), data_of((6,))
    pytest.importorskip("transformers")
    waves = TranscribePreprocessing(features=Features(kind="waveform", normalise="none"))
    return build(ModelSpec(name=name, args=SMALL), waves, 5), data_of((), 30)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", ["conformer", "transformers/wav2vec2"])
def test_training_in_half_precision_is_near_that_in_single_precision(name, precision, monkeypatch):
    model, data = make(name)
    source = copy.deepcopy(model)
    strategies = [ctl.L2SP(alpha=0.1), ctl.OutputConservation(weight=0.3, blank=0), ctl.FeatureConservation(alpha=0.1)]
    seen = set()
    plain = F.ctc_loss

    def ctc_loss(scores, *arguments, **options):
        seen.add(scores.dtype)
        return plain(scores, *arguments, **options)

    monkeypatch.setattr(F, "ctc_loss", ctc_loss)
    losses, hidden = {}, set()
    for kind in ("fp32", precision):
        batch = data.batch([0, 1])
        example = {key: batch[key] for key in ("inputs", "lengths")}
        adaptation = ctl.adapt(copy.deepcopy(model), source, strategies, example=example)
        linear = next(one for one in adaptation.model.modules() if isinstance(one, torch.nn.Linear))
        hook = linear.register_forward_hook(lambda _, __, out: hidden.add(out.dtype))
        training = ctl.Training(device="cpu", epochs=3, batch_size=2, lr=0.001, precision=kind, clip=5.0)
        valid = {"target": data}
        result = ctl.fit(
            adaptation, data, valid, training, forward=TASK.forward, loss=TASK.loss, metrics=lambda *_: {}, seed=0
        )
        hook.remove()
        losses[kind] = torch.tensor([[line["loss"], line["valid"]["target"]["loss"]] for line in result.history])
        assert all(bool(parameter.isfinite().all()) for parameter in adaptation.model.parameters())
    assert seen == {torch.float32}
    assert hidden == {torch.float32, HALVES[precision]}
    # In fp16 the first steps are left out, until the scale of the loss is found.
    compared = slice(0, 3) if precision == "bf16" else (0, 0)
    torch.testing.assert_close(losses[precision][compared], losses["fp32"][compared], rtol=0.02, atol=0.05)
    assert losses[precision][-1, 1] < losses[precision][0, 1]
