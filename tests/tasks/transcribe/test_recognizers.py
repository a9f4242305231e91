"""Models that are no recognizers are refused before training."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.source_labels import check_outputs
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
