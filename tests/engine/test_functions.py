"""Tasks defined by three functions; classification by default."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import conservtl as ctl
from conservtl.engine import Functions, accuracy, cross_entropy, evaluate, forward
from conservtl.engine.criterion import score

CPU = torch.device("cpu")


class Transcriber(nn.Module):
    """(N, T, 5) frames to (N, T, 4) scores; 0 is the blank."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, frames):
        return self.out(self.rnn(frames)[0])


def utterances(count=24):
    """Each sound lasts three frames, then one of silence; lengths differ."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        text = torch.randint(1, 4, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
        codes = torch.stack([text, text, text, torch.zeros_like(text)], 1).reshape(-1)
        noise = 0.1 * torch.randn(len(codes), 5, generator=generator)
        found.append((F.one_hot(codes, 5).float() + noise, text))
    return found


def padded(items):
    frames, texts = zip(*items, strict=True)
    return {
        "frames": nn.utils.rnn.pad_sequence(frames, batch_first=True),
        "lengths": torch.tensor([len(f) for f in frames]),
        "texts": nn.utils.rnn.pad_sequence(texts, batch_first=True),
        "text_lengths": torch.tensor([len(t) for t in texts]),
    }


def ctc(outputs, batch):
    scores = outputs.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, batch["texts"], batch["lengths"], batch["text_lengths"], zero_infinity=True)


def exact(outputs, batch):
    """Share of utterances transcribed without an error."""
    right = 0
    for best, frames, text, length in zip(
        outputs.argmax(-1), batch["lengths"], batch["texts"], batch["text_lengths"], strict=True
    ):
        collapsed = torch.unique_consecutive(best[:frames])
        right += collapsed[collapsed != 0].tolist() == text[:length].tolist()
    return {"exact": right / len(outputs)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ctc_with_padding(precision):
    """Transcription: sequences of different lengths, padded per batch by the user's DataLoader."""
    torch.manual_seed(0)
    adaptation = ctl.adapt(Transcriber(), Transcriber(), [ctl.L2SP(alpha=1e-4)])
    loader = DataLoader(utterances(), 8, shuffle=True, collate_fn=padded)
    result = ctl.fit(
        adaptation,
        loader,
        {"target": loader},
        ctl.Training(device="cpu", epochs=30, lr=0.02, precision=precision, clip=1.0, keep="target", select="loss"),
        forward=lambda model, batch: model(batch["frames"]),
        loss=ctc,
        metrics=exact,
        seed=1,
    )
    assert result.history[-1]["target"]["exact"] > 0.9
    assert result.best == pytest.approx(-min(line["target"]["loss"] for line in result.history))


def test_ctc_over_held_tensors():
    """The same task with all sequences padded to one length: a dictionary of tensors."""
    adaptation = ctl.adapt(Transcriber(), Transcriber())
    result = ctl.fit(
        adaptation,
        padded(utterances()),
        training=ctl.Training(device="cpu", epochs=3, batch_size=8, lr=0.02),
        forward=lambda model, batch: model(batch["frames"]),
        loss=ctc,
        metrics=exact,
    )
    assert result.steps == 9
    assert result.history[-1]["loss"] < result.history[0]["loss"]


class Recognizer(Transcriber):
    """Returns scores and lengths, like the acoustic models of torchaudio."""

    def forward(self, frames, lengths):
        return super().forward(frames), lengths


@pytest.mark.parametrize("keep", [True, False])
def test_ctc_conserves_the_outputs_of_what_was_said(keep):
    """Values in the padding change no weight: neither the loss nor the conserved outputs depend on them."""

    def trained(data, weight):
        torch.manual_seed(0)
        adaptation = ctl.adapt(Recognizer(), Recognizer(), [ctl.OutputConservation(weight=weight, temperature=2.0)])
        ctl.fit(
            adaptation,
            data,
            training=ctl.Training(device="cpu", epochs=3, batch_size=8, lr=0.02),
            forward=lambda model, batch: model(batch["frames"], batch["lengths"]),
            loss=lambda outputs, batch: ctc(outputs[0], batch),
            metrics=lambda outputs, batch: exact(outputs[0], batch),
            keep_frozen_outputs=keep,
            seed=1,
        )
        return nn.utils.parameters_to_vector(adaptation.model.parameters())

    data = padded(utterances())
    silent = torch.arange(data["frames"].shape[1]) >= data["lengths"][:, None]
    spoiled = {**data, "frames": torch.where(silent[..., None], 7.0, data["frames"])}
    assert silent.any()
    weights = trained(data, 1.0)
    torch.testing.assert_close(trained(spoiled, 1.0), weights)
    assert not torch.allclose(trained(data, 0.0), weights, atol=1e-3)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class HuggingFaceStyle(nn.Module):
    """Called with keywords; returns an object, or a dictionary, with logits."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.head = nn.Linear(6, 3)

    def forward(self, input_values, attention_mask):
        logits = self.head(input_values * attention_mask)
        return {"object": Output(logits), "dictionary": {"logits": logits}, "tensor": logits}[self.kind]


@pytest.mark.parametrize("kind", ["object", "dictionary", "tensor"])
@pytest.mark.parametrize("way", ["held", "loader", "batch encoding"])
def test_dictionary_batches(kind, way):
    """The batch has labels beside the model's keyword arguments; outputs have .logits, ["logits"] or are logits."""
    torch.manual_seed(0)
    batch = {
        "input_values": torch.randn(20, 6),
        "attention_mask": torch.ones(20, 6),
        "labels": torch.randint(0, 3, (20,)),
    }
    train = {"held": batch, "loader": [batch], "batch encoding": [UserDict(batch)]}[way]
    model = HuggingFaceStyle(kind)
    adaptation = ctl.adapt(model, HuggingFaceStyle(kind))
    result = ctl.fit(adaptation, train, {"target": train}, ctl.Training(device="cpu", epochs=30, lr=0.1))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert set(result.history[-1]["target"]) == {"loss", "accuracy"}


def test_named_tuples_stay_named():
    Pair = namedtuple("Pair", "sound word")  # noqa: PYI024
    adaptation = ctl.adapt(nn.Linear(4, 2), nn.Linear(4, 2))
    ctl.fit(
        adaptation,
        [Pair(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))],
        training=ctl.Training(device="cpu", epochs=1),
        forward=lambda model, batch: model(batch.sound),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch.word),
    )


def test_a_metric_on_two_sets(plain, data):
    """A Holdout is evaluated by its own functions: another head, other labels, other metrics."""
    adaptation = plain()
    old_head = nn.Linear(8, 7)

    def source_view(model, batch):
        return old_head(model.body(model.stem(batch[0])).mean(-1))

    source = (data[0], torch.randint(0, 7, (50,)))
    result = ctl.fit(
        adaptation,
        data,
        {"target": data, "source": ctl.Holdout(source, forward=source_view)},
        ctl.Training(device="cpu", epochs=2, keep="harmonic"),
    )
    with torch.no_grad():
        adaptation.model.eval()
        right = source_view(adaptation.model, source).argmax(-1) == source[1]
    best = max(result.history, key=lambda line: score(line["valid"], "harmonic"))
    assert best["source"]["accuracy"] == pytest.approx(float(right.float().mean()))
    assert set(best["valid"]) == {"target", "source"}


def test_metrics_are_means_over_examples(net):
    """A short last batch counts by its examples; the mode of every module is restored."""
    model = net().train()
    model.body.eval()
    inputs, labels = torch.randn(10, 3, 12), torch.randint(0, 4, (10,))
    found = evaluate(model, (inputs, labels), Functions(forward, cross_entropy, accuracy), CPU, batch_size=4)
    assert model.training
    assert not model.body.training
    assert model.stem.training
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(-1) == labels).float().mean()))


def test_an_empty_set_is_named(plain, data):
    with pytest.raises(ctl.DataError, match="a set to evaluate on has no examples"):
        ctl.fit(plain(), data, {"target": []}, ctl.Training(device="cpu", epochs=1))


def test_a_loss_is_a_scalar(plain, data):
    with pytest.raises(ctl.SpecError, match=r"the loss must be a scalar.*\(16,\)"):
        ctl.fit(
            plain(),
            data,
            training=ctl.Training(device="cpu", batch_size=16),
            loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"),
        )


def test_a_pair_of_sum_and_count_is_pooled_over_the_set():
    """Wrong words over words of all batches together: not the mean of the batches' rates."""
    wrong, words = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 10.0, 4.0])

    def rates(_, batch):
        return {"wer": (batch[1].sum(), batch[2].sum()), "mean": (batch[1] / batch[2]).mean()}

    functions = Functions(lambda _, batch: batch[0], lambda outputs, _: outputs.mean(), rates)
    for batch_size in (1, 2, 3):
        found = evaluate(nn.Identity(), (torch.zeros(3), wrong, words), functions, CPU, batch_size)
        assert found["wer"] == pytest.approx(4 / 16)
        assert found["mean"] == pytest.approx((0.5 + 0 + 0.75) / 3)
