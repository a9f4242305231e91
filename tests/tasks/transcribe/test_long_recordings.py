"""Recordings of any length: read as overlapping windows, their outputs joined."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.adapted import Adapted
from conservtl.tasks.audio.reading import duration_of
from conservtl.tasks.audio.streaming import windows_of
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.long_recordings import joined_frames, joined_words
from conservtl.tasks.transcribe.recognizers import Decoded
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.tokens import Characters

soundfile = pytest.importorskip("soundfile")

RATE = 2000
LABELS = ("<blank>", "a", "b", "c")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Ten minutes: a step of the level each second, at one of four heights."""
    file = tmp_path_factory.mktemp("long") / "long.wav"
    steps = torch.randint(1, 4, (600,), generator=torch.Generator().manual_seed(0))
    wave = (steps.float() / 8).repeat_interleave(RATE)
    wave[::2] *= -1  # no offset
    soundfile.write(file, wave.numpy(), RATE)
    return file, steps


class Steps(torch.nn.Module):
    """A recognizer without context: the level of each tenth of a second is a token."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(8.0))
        self.longest = 0

    def forward(self, inputs, lengths):
        self.longest = max(self.longest, inputs.shape[1])
        frames = inputs.abs().unfold(1, RATE // 10, RATE // 10).median(-1).values
        distance = (frames.unsqueeze(-1) * self.scale - torch.arange(4.0)).abs()
        return -9 * distance, lengths // (RATE // 10)


def adapted(model):
    features = Features(kind="waveform", sample_rate=RATE, normalise="none")
    preprocessing = TranscribePreprocessing(features=features, tokens=Characters(alphabet="abc"))
    return Adapted(model, LABELS, preprocessing, Transcribe(LABELS, preprocessing))


def test_ten_minutes_are_heard_as_a_whole_would_be_in_memory_for_a_window(recording):
    file, steps = recording
    model = Steps()
    (found,) = adapted(model).predict(file)
    distinct = torch.unique_consecutive(steps)  # CTC merges equal neighbours
    assert found.label == "".join(LABELS[step] for step in distinct.tolist())
    assert model.longest == 30 * RATE


def test_long_and_short_files_are_answered_in_their_order(recording, tmp_path):
    file, steps = recording
    short = tmp_path / "short.wav"
    wave = (steps[:3].float() / 8).repeat_interleave(RATE)
    wave[::2] *= -1
    soundfile.write(short, wave.numpy(), RATE)
    broken = tmp_path / "broken.wav"
    broken.write_text("no audio")
    skipped: dict[str, str] = {}
    found = adapted(Steps()).predict([short, file, broken, short], on_bad="skip", skipped=skipped)
    assert [one.file for one in found] == [short, file, short]
    assert found[0].label == found[2].label
    assert list(skipped) == [str(broken)]


def test_windows_cover_a_recording_and_hold_no_more_than_one(recording, monkeypatch):
    file, _ = recording
    read = []
    plain = soundfile.SoundFile.read
    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", lambda self, n, **more: read.append(n) or plain(self, n, **more))
        windows = list(windows_of(file, 30.0, 6.0))
    assert duration_of(file) == 600
    assert max(read) == 30 * RATE
    assert [one.start for one in windows] == [24.0 * place for place in range(25)]
    assert [one.end for one in windows] == [min(600.0, 24.0 * place + 30) for place in range(25)]
    whole = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    assert all(torch.equal(one.wave, whole[round(one.start * RATE) : round(one.end * RATE)]) for one in windows)


def test_samples_that_are_not_finite_are_refused_with_their_place(tmp_path):
    wave = torch.zeros(40 * RATE)
    wave[35 * RATE] = torch.nan
    soundfile.write(tmp_path / "nan.wav", wave.numpy(), RATE, subtype="FLOAT")
    with pytest.raises(ctl.DataError, match=r"nan.wav must have finite samples; some between 24.0 and 40.0 s are not"):
        list(windows_of(tmp_path / "nan.wav", 30.0, 6.0))


def test_a_long_recording_that_is_silent_or_cut_short_is_refused_as_a_short_one_is(tmp_path):
    wave = torch.randn(40 * RATE, generator=torch.Generator().manual_seed(0)) / 9
    later = torch.where(torch.arange(40 * RATE) < 35 * RATE, 0.0, wave)
    for name, channels in {"silent": 0 * wave, "inverted": torch.stack([wave, -wave], 1), "later": later}.items():
        soundfile.write(tmp_path / f"{name}.wav", channels.numpy(), RATE)
    content = (tmp_path / "later.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) * 9 // 10])
    for name, fault in {"silent": "no sample differs", "inverted": "they cancel", "cut": "promises 160,000 b"}.items():
        with pytest.raises(ctl.DataError, match=rf"{name}\.wav is .*{fault}"):
            adapted(Steps()).predict(tmp_path / f"{name}.wav")
    assert adapted(Steps()).predict(tmp_path / "later.wav")


def test_frames_are_cut_at_the_middle_of_the_overlap():
    """Windows 0 to 10 and 8 to 12 s, a frame each tenth: the cut is at 9 s."""
    whole = torch.arange(120.0).view(1, 120, 1)
    outputs = [(whole[:, :100], torch.tensor([100])), (whole[:, 80:], torch.tensor([40]))]
    logits, lengths = joined_frames(outputs, [(0.0, 10.0), (8.0, 12.0)])
    assert lengths.tolist() == [120]
    assert torch.equal(logits, whole)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c d e", "d e f g h", "g h i"], "a b c d e f g h i"),
        (["a b c d x", "c d e f g"], "a b c d e f g"),  # what the end of a window misses is taken from the next
        (["a b c", "d e f"], "a b c d e f"),
        (["", "a b", ""], "a b"),
        (["a b a b a b a b a b", "a b c c c c c c c c"], "a b a b a b a b a b c c c c c c c c"),
    ],
)
def test_texts_are_joined_at_the_longest_run_of_equal_words(texts, expected):
    assert joined_words(texts, overlap=0.25 if len(texts[0].split()) > 5 else 0.5) == expected


def test_texts_of_a_decoder_are_joined():
    labels = ("<blank>", "|", "a", "b", "c")
    task = Transcribe(labels, TranscribePreprocessing())

    def heard(text, sure):
        tokens = torch.tensor([[labels.index("|" if letter == " " else letter) for letter in text]])
        return Decoded(torch.zeros(1, 1, 5), torch.ones(1, 1).bool(), tokens, torch.tensor([sure]))

    spans = [(0.0, 30.0), (24.0, 54.0)]
    found = task.joined([heard("a b c ab cb", 0.5), heard("cb ca", 0.8)], spans, labels, "long.wav")
    assert found.label == "a b c ab cb ca"
    assert found.probability == pytest.approx((5 * 0.5 + 2 * 0.8) / 7)
