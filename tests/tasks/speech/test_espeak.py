"""Synthetic speakers: the same bytes in every process, and no voice that does not exist."""

from __future__ import annotations

import pytest
import torch

from conservtl.errors import DataError, SpecError
from conservtl.tasks.audio.espeak import speak, takes_of
from conservtl.tasks.speech import SOURCE_VOICES, TARGET_VOICES, EspeakData, load

pytest.importorskip("espeakng_loader", reason="espeakng_loader is not installed")


def test_enough_voices():
    assert len(set(SOURCE_VOICES)) >= 12
    assert len({voice.partition("+")[0] for voice in SOURCE_VOICES}) >= 4
    assert not set(SOURCE_VOICES) & set(TARGET_VOICES)


@pytest.mark.parametrize("voice", [SOURCE_VOICES[1], *TARGET_VOICES])
def test_the_same_bytes_from_fresh_processes(voice):
    """A whisper included, whose breath comes from a generator that espeak-ng seeds with the clock."""
    said = takes_of(voice, ["seven", "two"], 3)
    for (first, rate), (again, _) in zip(speak(said), speak(said), strict=True):
        assert rate == 22050
        assert torch.equal(first, again)
        assert 0.1 < len(first) / rate < 2
        assert first.abs().max() > 0.01


def test_a_voice_does_not_depend_on_the_others():
    own = takes_of("en-us", ["seven", "two"], 2)
    others = takes_of("en+f3", ["seven", "two"], 2)
    alone, among = speak(own), speak([*others, *own])[len(others) :]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, among, strict=True))


def test_takes_differ():
    spoken = [wave for wave, _ in speak(takes_of("en-us", ["seven"], 6))]
    assert len({len(wave) for wave in spoken}) == 6


@pytest.mark.parametrize(
    ("voice", "message"), [("en-us+nobody", "no voice variant 'nobody'.*whisper"), ("klingonish", "'klingonish'")]
)
def test_voices_that_do_not_exist(voice, message):
    with pytest.raises(DataError, match=message):
        speak(takes_of(voice, ["seven"], 1))


def test_domains_of_voices():
    spec = EspeakData(voices=SOURCE_VOICES[:2], words=("yes", "no"), takes=2, held_out=1, target_takes=4, shots=2)
    got, half = load(spec, seed=0), load(spec, seed=0, source=False)
    assert (len(got.shots), len(got.target_test)) == (4, 4)
    assert (len(got.source_train), len(got.source_test)) == (8, 4)
    assert got.labels == ("no", "yes")
    assert all(name.startswith(spec.target) for name in (*got.shots.names, *got.target_test.names))
    assert all(name.endswith("/2") for name in got.source_test.names)
    assert half.source_train is None
    assert torch.equal(half.shots.inputs, got.shots.inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": SOURCE_VOICES[0]}, r"data\.voices must not contain data\.target; received 'en-us'"),
        ({"target_takes": 5}, r"Raise data\.target_takes"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(SpecError, match=message):
        load(EspeakData.model_validate(fields), seed=0)
