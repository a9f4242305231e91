"""The parts of a target's utterances, and inputs that are read from them or spoken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe import recordings
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.recordings import FileInputs, SpokenInputs, read_utterance
from conservtl.tasks.transcribe.utterances import Utterance, _unlabelled, split_utterances

WAVEFORM = Features(kind="waveform", sample_rate=8000, normalise="none")
ALL = [Utterance(f"{speaker}{place}", "one", speaker, 1.0) for speaker in ("anna", "ben", "cleo") for place in range(4)]


def split(utterances=ALL, **options):
    given = {"shots": 2, "validation": 0, "seed": 0, "source_speakers": None, "held_out_speakers": (), "held_out": 0.5}
    return split_utterances(utterances, "cleo", **given | options)


@pytest.mark.parametrize(
    ("parts", "trained", "tested"),
    [
        (("train", "test"), "train", "test"),
        (("train", "dev"), "train", "dev"),
        (("train", "dev", "test"), "train", "test"),
        ((None, "test"), None, "test"),  # what no part names is trained on
        (("dev", "test"), "dev", "test"),
        (("test",), "test", "test"),  # a part alone is no split: both are drawn from it
    ],
)
def test_official_parts_are_kept_by_both_domains(parts, trained, tested):
    utterances = [dataclasses.replace(one, name=f"{part}{one.name}", part=part) for part in parts for one in ALL]
    found = split(utterances, held_out_speakers=["ben"])
    assert {one.part for one in (*found.shots, *found.source_train)} == {trained}
    of_ben = [one for one in utterances if one.speaker == "ben"]
    assert {one.part for one in (*found.target_test, *found.source_test) if one not in of_ben} == {tested}
    assert {one for one in found.source_test if one.speaker == "ben"} == set(of_ben)
    assert len(found.target_test) == (4 if len(parts) > 1 else 2)
    bare = split(utterances, unlabelled=1)
    assert [one.part for one in bare.unlabelled] == [trained]
    assert not {bare.unlabelled[0].name} & {one.name for one in (*bare.shots, *bare.target_test)}


@pytest.mark.parametrize("field", ["source_speakers", "held_out_speakers"])
@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        (["anna", "cleo"], "must not contain data.target; received 'cleo' in both"),
        (["dora"], "must be speakers of the data"),
    ],
)
def test_speakers_of_the_source_are_known_and_not_the_target(field, speakers, message):
    with pytest.raises(ctl.DataError, match=rf"data\.{field} {message}"):
        split(**{field: speakers})


def test_speakers_of_the_source_are_those_named():
    found = split(source_speakers=["ben"])
    assert {one.speaker for one in (*found.source_train, *found.source_test)} == {"ben"}


def test_a_target_without_a_text_is_refused():
    with pytest.raises(ctl.DataError, match="'cleo' must have an utterance with a text to test on; received none"):
        split([dataclasses.replace(one, text="") if one.speaker == "cleo" else one for one in ALL])


def test_all_without_a_text_must_be_some():
    with pytest.raises(ctl.DataError, match="all takes the target's utterances without a text, and there is none"):
        _unlabelled(ALL, [], "all", spare=True, seed=0)
    bare = dataclasses.replace(ALL[0], text="")
    assert _unlabelled([*ALL[1:], bare], [], "all", spare=True, seed=0) == [bare]


def test_an_utterance_lies_within_its_recording(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    with pytest.raises(ctl.DataError, match="anna0 has no recording"):
        read_utterance(ALL[0])
    wave = torch.linspace(-0.5, 0.5, 8000)
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 8000, subtype="FLOAT")
    part = dataclasses.replace(ALL[0], file=tmp_path / "a.wav", offset=0.25, seconds=0.5)
    found, rate = read_utterance(part)
    assert (torch.equal(found, wave[2000:6000]), rate) == (True, 8000)
    with pytest.raises(ctl.DataError, match=r"must lie within its recording of 1\.00 s; received offset 0\.25 and dur"):
        read_utterance(dataclasses.replace(part, seconds=1.0))
    inputs = FileInputs([part], WAVEFORM)
    assert torch.equal(inputs.varied(0, None), inputs[0])  # nothing says how it changes


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_no_more_of_a_recording_is_read_than_the_utterance(kind, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    wave = torch.randn(80_000, generator=torch.Generator().manual_seed(0)) / 9
    soundfile.write(tmp_path / f"a.{kind}", wave.numpy(), 8000)
    whole = torch.from_numpy(soundfile.read(tmp_path / f"a.{kind}", dtype="float32")[0])
    read, plain = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *of: read.append(plain(*of)) or read[-1])
    one = dataclasses.replace(ALL[0], file=tmp_path / f"a.{kind}", offset=7.1234, seconds=1.5)
    assert torch.equal(read_utterance(one)[0], whole[56_987:68_987])
    assert sum(map(len, read)) == 12_000
    nearly = dataclasses.replace(one, offset=0.0, seconds=9.991)  # a list rounds
    assert torch.equal(read_utterance(nearly)[0], whole)


def test_inputs_beyond_the_memory_for_them_are_read_each_time(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", torch.linspace(-0.5, 0.5, 800).numpy(), 8000)
    inputs = FileInputs([dataclasses.replace(ALL[0], file=tmp_path / "a.wav", seconds=0.1)] * 2, WAVEFORM)
    kept = inputs[0]
    monkeypatch.setattr(recordings, "_KEPT", 1)
    assert inputs[0] is kept
    assert inputs[1] is not inputs[1]
    assert torch.equal(inputs[1], kept)


def test_all_utterances_are_spoken_at_once():
    asked = []

    def speak(said):
        asked.append(said)
        return [(torch.full((800,), 0.1 * place), 8000) for place in range(len(said))]

    inputs = SpokenInputs(ALL[:2], WAVEFORM, {one.name: one.text for one in ALL}, speak)
    assert [float(inputs.wave(place)[0][0]) for place in (1, 0, 1)] == pytest.approx([0.1, 0.0, 0.1])
    assert asked == [["one", "one"]]
