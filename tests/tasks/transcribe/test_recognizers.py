"""Models that are no recognizers are refused before training."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.source_labels import check_outputs
from conservtl.tasks.transcribe.features import TranscribePreprocessing
from conservtl.tasks.transcribe.recognizers import Decoded
from conservtl.tasks.transcribe.task import Transcribe


class Recognizer(torch.nn.Module):
    """Returns what a test says."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = torch.nn.Linear(8, 5), outputs

    def forward(self, inputs, lengths):
        return self.outputs(self.layer(inputs), lengths)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x, lengths: (x.mean(1), lengths), r"must return logits of \(N, frames, tokens\); it returns \(2, 5\)"),
        (lambda x, lengths: x, r"must return the frames of each of 2 utterances beside its logits; it does not"),
        (lambda x, lengths: (x, lengths / 30), r"must return lengths in frames; it returns \[1.0, 0.66"),
        (lambda x, lengths: (x[..., :4], lengths), r"must have an output for each of 5 tokens, .* it has 4"),
        (lambda x, lengths: (x, lengths), None),
    ],
)
def test_a_model_that_is_no_recognizer_is_refused(outputs, message):
    example = {"inputs": torch.zeros(2, 30, 8), "lengths": torch.tensor([30, 20])}
    if message is None:
        check_outputs(Transcribe(), Recognizer(outputs), example, 5)
        return
    with pytest.raises(ctl.SpecError, match="model: Recognizer .*" + message):
        check_outputs(Transcribe(), Recognizer(outputs), example, 5)


def test_a_model_that_takes_no_lengths_is_refused():
    example = {"inputs": torch.zeros(2, 30, 8), "lengths": torch.tensor([30, 20])}
    with pytest.raises(ctl.SpecError, match=r"model: Linear must take \(inputs, lengths\) and return .*; it raises"):
        check_outputs(Transcribe(), torch.nn.Linear(8, 5), example, 5)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x, lengths: (x.transpose(0, 1), lengths), r"one length for each example; received shape \(2,\) for 30"),
        (lambda x, lengths: (x, 2 * lengths), r"must be from 1 to the number of positions .*; received up to 60"),
        (lambda x, lengths: (x, lengths - 20), r"must be integers from 1 to .*; received 0 to 10"),
    ],
)
def test_lengths_that_do_not_fit_the_logits_are_refused(outputs, message):
    example = {"inputs": torch.zeros(2, 30, 8), "lengths": torch.tensor([30, 20])}
    with pytest.raises(ctl.SpecError, match=message):
        check_outputs(Transcribe(), Recognizer(outputs), example, 5)


class OwnDecoder(torch.nn.Module):
    """A decoder of a user's own: each token is scored by the one before and the mean of the inputs."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inputs = torch.nn.Embedding(5, 5), torch.nn.Linear(8, 5)

    def teacher(self, labels):
        return {"before": torch.nn.functional.pad(labels.clamp_min(0), (1, 0)), "mask": labels >= 0}

    def forward(self, inputs, lengths, before=None, mask=None):
        before = torch.zeros(len(inputs), 1, dtype=torch.long) if before is None else before
        valid = torch.ones_like(before, dtype=torch.bool)
        if mask is not None:
            valid[:, 1:] = mask
        return Decoded(self.tokens(before) + self.inputs(inputs.mean(1)).unsqueeze(1), valid)

    def generate(self, inputs, lengths):
        best, token = self(inputs, lengths).logits[:, 0].softmax(-1).max(-1)
        return token.masked_fill(token == 0, -100).unsqueeze(1), best


def test_a_decoder_of_ones_own_is_a_recognizer_by_what_it_returns():
    example = {"inputs": torch.randn(2, 30, 8), "lengths": torch.tensor([30, 20])}
    model, task = OwnDecoder(), Transcribe(("<blank>", "|", "a", "b", "c"), TranscribePreprocessing())
    check_outputs(task, model, example, 5)
    with pytest.raises(ctl.SpecError, match=r"model: OwnDecoder must have an output for each of 6 tokens"):
        check_outputs(task, model, example, 6)
    batch = {**example, "labels": torch.tensor([[2, 3], [4, -100]]), "names": ["a", "b"]}
    outputs = task.answer(model, batch)
    scores = outputs.logits.log_softmax(-1)
    first = -(scores[0, 0, 2] + scores[0, 1, 3] + scores[0, 2, 0]) / 3
    second = -(scores[1, 0, 4] + scores[1, 1, 0]) / 2
    torch.testing.assert_close(task.loss(outputs, batch), (first + second) / 2)
    assert [len(text) <= 1 for text in task.heard(outputs)] == [True, True]
