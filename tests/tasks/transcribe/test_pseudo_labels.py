"""Hypotheses of a model in the place of texts."""

from __future__ import annotations

import math

import pytest
import torch

import conservtl as ctl
from conservtl.data.sequences import Sequences, joined
from conservtl.tasks.transcribe.pseudo_labels import pseudo_labelled
from conservtl.tasks.transcribe.recognizers import CTC
from conservtl.tasks.transcribe.spec_augment import SpecAugment


class Heard(torch.nn.Module):
    """Inputs are log-probabilities already; counts its calls in training mode."""

    trained = 0

    def forward(self, inputs, lengths):
        self.trained += self.training
        return inputs, lengths


def utterance(*probabilities):
    return torch.tensor(probabilities).log()


SURE = utterance([0.02, 0.96, 0.02], [0.9, 0.05, 0.05], [0.01, 0.01, 0.98])
UNSURE = utterance([0.2, 0.5, 0.3], [0.3, 0.1, 0.6])
SILENT = utterance([0.98, 0.01, 0.01])
TEXT = torch.tensor([2, 2])
DATA = Sequences((UNSURE, SURE, SILENT), (TEXT, TEXT, TEXT), ("u", "s", "silent"), ("x", "x", "x"), (0.2, 0.3, 0.1))


def test_confidence_is_the_mean_posterior_of_frames_that_are_no_blank():
    batch = DATA.batch([0, 1, 2])
    found = CTC().confidence((batch["inputs"], batch["lengths"]))
    # (0.5 + 0.6) / 2; (0.96 + 0.98) / 2, the blank frame of 0.9 left out; no frame
    assert found.tolist() == pytest.approx([0.55, 0.97, 0.0], abs=1e-6)


@pytest.mark.parametrize(("least", "names"), [(0.9, ("s",)), (0.55, ("u", "s")), (0.0, ("u", "s"))])
def test_only_confident_hypotheses_stay_and_an_empty_one_never(least, names):
    model = Heard().train()
    found = pseudo_labelled(model, DATA, least=least - 1e-6 if least else 0, batch_size=2)
    assert found.names == names
    assert [one.tolist() for one in found.labels] == [[1, 2]] * len(names)
    assert found.groups == ("x",) * len(names)
    assert model.training
    assert model.trained == 0


def test_two_augmented_copies_must_agree():
    calls = []

    def swap_once(batch, generator):
        calls.append(torch.rand(1, generator=generator).item())
        inputs = batch["inputs"].clone()
        if len(calls) == 2:
            inputs[1] = inputs[1].roll(1, -1)
        return {**batch, "inputs": inputs}

    found = pseudo_labelled(Heard(), DATA, least=0.5, augment=swap_once)
    assert found.names == ("u",)
    assert len(set(calls)) == 2
    nothing = SpecAugment(time_masks=0, frequency_masks=0)
    assert pseudo_labelled(Heard(), DATA, least=0.5, augment=nothing.of_batch).names == ("u", "s")


def test_texts_and_hypotheses_are_trained_on_together():
    both = joined([DATA.take([0]), pseudo_labelled(Heard(), DATA)])
    assert [one.tolist() for one in both.labels] == [[2, 2], [1, 2]]
    assert both.batch([0, 1])["inputs"].shape == (2, 3, 3)


def test_when_nothing_is_left_the_surest_is_named():
    with pytest.raises(ctl.DataError, match=r"of 1 hypothesis must be left; the surest has a mean posterior of 0.55"):
        pseudo_labelled(Heard(), DATA.take([0]))
    with pytest.raises(ctl.SpecError, match=r"least must be a probability; received nan"):
        pseudo_labelled(Heard(), DATA, least=math.nan)
