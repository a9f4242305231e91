"""Features on a device: computed there, kept there within a budget, the same as on a CPU."""

from __future__ import annotations

import pytest
import torch

from conservtl.data import Sequences
from conservtl.data.sequences import joined
from conservtl.engine.batching import as_batches
from conservtl.engine.holding import Holding
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.recordings import Inputs
from conservtl.tasks.transcribe.utterances import Utterance

CPU, META = torch.device("cpu"), torch.device("meta")
COUNT = 4


class Noise(Inputs):
    """Noise of 0.3 s and more."""

    read = 0

    def wave(self, place):
        self.read += 1
        return torch.randn(600 + 100 * place, generator=torch.Generator().manual_seed(place)), 2000


def noise(features=None):
    utterances = [Utterance(str(n), "a", "ann", 0.3 + 0.05 * n) for n in range(COUNT)]
    return Noise(utterances, features or Features(sample_rate=2000, n_mels=8, hop=0.02))


def data_of(inputs):
    labels = tuple(torch.tensor([1]) for _ in range(COUNT))
    return Sequences(inputs, labels, tuple("abcd"), (), tuple(0.3 + 0.05 * n for n in range(COUNT)))


@pytest.mark.parametrize("kind", ["logmel", "waveform", "whisper", "fbank"])
def test_features_are_computed_where_the_recording_is(kind):
    """On a device without values, so that a step on the CPU would fail."""
    features = Features(kind=kind) if kind in ("whisper", "fbank") else Features(kind=kind, sample_rate=2000, n_mels=8)
    wave = torch.randn(16_000)
    made = features(wave.to(META), 4000)
    assert made.device == META
    assert made.shape == features(wave, 4000).shape


def test_inputs_are_made_once_on_a_device_and_kept_there():
    inputs = noise()
    moved = inputs.on(META, lambda _, device: device)
    assert moved is inputs.on(META, lambda _, device: device)
    assert inputs.on(CPU, None) is inputs
    assert [moved[place].device for place in (0, 0, 1)] == [META] * 3
    assert moved.read == 2
    assert inputs[0].device == CPU
    assert moved[0].shape == inputs[0].shape


def test_what_exceeds_the_budget_is_kept_by_the_host():
    placed = []

    def place(size, device):
        placed.append(size)
        return device if len(placed) < 2 else CPU

    inputs = noise(Features(kind="waveform", sample_rate=2000))
    moved = inputs.on(torch.device("cuda"), place)
    moved._device = CPU  # stands for the GPU
    assert torch.equal(moved[1], inputs[1])
    assert torch.equal(moved[2], inputs[2])
    assert placed == [700 * 4, 800 * 4]
    assert moved._bytes == sum(placed)  # both are on a CPU here


def test_batches_of_parts_are_on_the_device_whole():
    parts = joined([data_of(noise()), data_of(tuple(torch.ones(3 + n, 8) for n in range(COUNT)))])
    batch = parts.take([1, 5]).on(META, lambda _, device: device).batch([0, 1])
    assert batch["inputs"].device == META
    assert batch["inputs"].shape == parts.batch([1, 5])["inputs"].shape
    assert batch["lengths"].tolist() == parts.batch([1, 5])["lengths"].tolist()


def test_batches_of_a_run_equal_those_made_on_a_cpu(device):
    """On every device that is there."""
    data = data_of(noise())
    batches = [
        [batch.content for batch in as_batches(data, 2, one, shuffle=False, holding=Holding(memory=1e-5)).epoch()]
        for one in (CPU, device)
    ]
    for there, here in zip(*batches, strict=True):
        assert here["inputs"].device.type == device.type
        torch.testing.assert_close(here["inputs"].cpu(), there["inputs"], atol=1e-4, rtol=1e-4)
