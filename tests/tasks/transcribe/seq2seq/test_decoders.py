"""Outputs, losses and texts of transformers' Whisper and Speech2Text."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe.beam_search import Beam
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.recognizers import Decoded, SequenceToSequence
from conservtl.tasks.transcribe.task import Transcribe

pytest.importorskip("transformers")


@torch.no_grad()
def test_logits_are_those_of_the_network_for_shifted_labels(kind, model, batch, network):
    """The library's own shift: transformers puts the start before the labels, and the end among them."""
    outputs = Transcribe().forward(model, batch)
    assert outputs.logits.shape == (2, 4, 7)
    assert outputs.mask.tolist() == [[True, True, True, True], [True, True, False, False]]
    targets = torch.tensor([[1, 2, 3, 0], [4, 0, -100, -100]])
    for row, length in enumerate(batch["lengths"].tolist()):
        features = batch["inputs"][row : row + 1, :length]
        features = features.transpose(1, 2) if kind == "whisper" else features
        known = targets[row : row + 1, : int(outputs.mask[row].sum())]
        plain = model.network(input_features=features, labels=known)
        torch.testing.assert_close(outputs.logits[row, outputs.mask[row]], plain.logits[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_each_utterance(model, batch):
    task = Transcribe()
    outputs = task.forward(model, batch)
    scores = outputs.logits.log_softmax(-1)
    first = -(scores[0, 0, 1] + scores[0, 1, 2] + scores[0, 2, 3] + scores[0, 3, 0]) / 4
    second = -(scores[1, 0, 4] + scores[1, 1, 0]) / 2
    torch.testing.assert_close(task.loss(outputs, batch), (first + second) / 2)


@torch.no_grad()
def test_the_text_generated_is_that_of_the_most_probable_tokens(model, batch):
    """Without a cache: the decoder is run on all tokens so far."""
    heard, posteriors = model.generate(batch["inputs"], batch["lengths"])
    for row in range(2):
        text: list[int] = []
        best = []
        while len(text) < 11:
            known = torch.tensor([text], dtype=torch.long)
            one = {name: batch[name][row : row + 1] for name in ("inputs", "lengths")}
            scores = model(**one, **model.teacher(known)).logits[0, -1].softmax(-1)
            if int(scores.argmax()) == 0:
                break
            text.append(int(scores.argmax()))
            best.append(float(scores.max()))
        assert heard[row][heard[row] >= 0].tolist() == text
        assert float(posteriors[row]) == pytest.approx(sum(best) / max(1, len(best)), abs=1e-4)
    assert model(batch["inputs"], batch["lengths"]).logits.shape == (2, 1, 7)


@torch.no_grad()
def test_the_encoder_runs_once_for_the_loss_and_the_text(model, batch):
    expected, calls = model.generate(batch["inputs"], batch["lengths"]), []
    encoder = model.network.get_encoder()
    handle = encoder.register_forward_hook(lambda *_: calls.append(None))
    found = Transcribe().answer(model, batch)
    handle.remove()
    assert len(calls) == 1
    assert found.encoded is None
    assert torch.equal(found.heard, expected[0])
    assert torch.equal(found.posteriors, expected[1])
    torch.testing.assert_close(found.logits, Transcribe().forward(model, batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_of_all_texts_finds_the_best_by_its_probability_and_length(kind, batch, network, penalty):
    """Texts of up to three tokens, scored one by one; n counts the end, which a text that fills the decoder lacks."""
    model = network(kind, tokens=4, max_target_positions=4)
    texts = [list(text) for size in range(4) for text in product((1, 2, 3), repeat=size)]
    for row in range(2):
        one = {name: batch[name][row : row + 1] for name in ("inputs", "lengths")}
        scores = {}
        for text in texts:
            known = torch.tensor([text], dtype=torch.long)
            logs = model(**one, **model.teacher(known)).logits[0].log_softmax(-1)
            told = text if len(text) == 3 else [*text, 0]
            total = sum(float(logs[place, token]) for place, token in enumerate(told))
            scores[tuple(text)] = total / len(told) ** penalty
        heard = model.generate(**one, beams=60, length_penalty=penalty)[0]
        assert tuple(heard[0].tolist()) == max(scores, key=scores.__getitem__)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_searched_as_its_utterances_one_by_one(model, batch, beams):
    task = Transcribe(("<blank>", *"|abcde"), TranscribePreprocessing(decoding=Beam(beam=beams)))
    found = task.answer(model, batch)
    for row, length in enumerate(batch["lengths"].tolist()):
        one = {"inputs": batch["inputs"][row : row + 1, :length], "lengths": batch["lengths"][row : row + 1]}
        alone = task.answer(model, {**one, "labels": batch["labels"][row : row + 1]})
        assert task.heard(alone) == task.heard(found)[row : row + 1]
        torch.testing.assert_close(alone.posteriors[0], found.posteriors[row])


@torch.no_grad()
def test_the_text_is_generated_behind_what_was_added_at_the_input(kind, batch, network):
    model, plain = network(kind), network(kind)
    example = {name: batch[name] for name in ("inputs", "lengths")}
    ctl.adapt(model, network(kind), [ctl.InputTransform()], example=example)
    model.input_transform.bias.fill_(3.0)
    moved = batch["inputs"] + 3.0
    expected = plain.generate(moved, batch["lengths"])
    found = Transcribe().answer(model, batch)
    torch.testing.assert_close(found.posteriors, expected[1])
    assert not torch.allclose(found.posteriors, plain.generate(batch["inputs"], batch["lengths"])[1], rtol=1e-3)


def test_a_decoder_that_cannot_search_is_refused(batch):
    class Own(torch.nn.Module):
        def teacher(self, labels):
            return {"known": labels}

        def generate(self, inputs, lengths):
            raise AssertionError

    task = Transcribe(("<blank>", "a"), TranscribePreprocessing(decoding=Beam()))
    with pytest.raises(
        ctl.SpecError, match=r"data.decoding is a beam search, for which generate of Own must take beams"
    ):
        task.answer(Own(), batch)


@torch.no_grad()
def test_tokens_that_are_no_text_are_never_written(kind, batch, network):
    model = network(kind)
    heard = model.generate(batch["inputs"], batch["lengths"])[0]
    silent = int(heard[0, 0])
    model.tokens = replace(model.tokens, silent=(silent,))
    assert silent not in model.generate(batch["inputs"], batch["lengths"])[0]


def test_a_text_without_room_in_the_decoder_is_refused_by_name(model, batch):
    labels = torch.ones(2, 12, dtype=torch.long)
    with pytest.raises(ctl.DataError, match=r"^a: a text must have at most 11 tokens, .* received 12"):
        Transcribe().forward(model, {**batch, "labels": labels})


def test_outputs_in_another_order_renumber_what_was_heard():
    outputs = Decoded(
        torch.arange(4.0).expand(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 1, 0, -100]])
    )
    found = SequenceToSequence().outputs_at(outputs, [3, 0])
    assert found.logits[0, 0].tolist() == [3, 0]
    assert found.heard.tolist() == [[0, 2, 1, -100]]  # 1 is none of them


@pytest.mark.parametrize(
    ("args", "features", "message"),
    [
        ({"dmodel": 4}, {}, r"no field 'dmodel'.*d_model"),
        ({"vocab_size": 99}, {}, r"model.args.vocab_size must be 7, as data says; received 99"),
        ({"d_model": 10, "encoder_attention_heads": 3}, {}, r"model.args: whisper cannot be built"),
        ({}, {"kind": "logmel"}, r"data.features.kind must be 'whisper' for transformers/whisper; received 'logmel'"),
    ],
)
def test_what_cannot_be_built_is_refused(args, features, message):
    spec = ModelSpec(name="transformers/whisper", args=args)
    with pytest.raises(ctl.SpecError, match=message):
        build(spec, TranscribePreprocessing(features=Features(**{"kind": "whisper", **features})), 7)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Decoded(torch.zeros(2, 3, 5), torch.ones(2, 3)), r"a mask of booleans .* it returns float32 of \(2, 3\)"),
        (Decoded(torch.zeros(2, 5), torch.ones(2, 3)), r"logits of \(N, positions, tokens\); it returns \(2, 5\)"),
        (Decoded(torch.zeros(2, 3, 4), torch.ones(2, 3).bool()), r"for each of 5 tokens, the end among them; it has 4"),
        (Decoded(torch.zeros(2, 3, 5), torch.ones(2, 3).bool()), None),
    ],
)
def test_outputs_of_a_decoder_that_do_not_fit_are_refused(outputs, message):
    fault = Transcribe().fault(outputs, 5)
    assert fault is None if message is None else re.search(message, fault)
