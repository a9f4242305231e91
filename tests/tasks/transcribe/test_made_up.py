"""Utterances that are made: strings of recorded words, and sentences of a grammar."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe import Features, GrammarData, StringsData, load, speakers
from conservtl.tasks.transcribe.grammar import sentences
from conservtl.tasks.transcribe.strings import Strung, joined, strings_of
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.text import Normalisation

soundfile = pytest.importorskip("soundfile")

RATE = 2000
FEATURES = Features(sample_rate=RATE, n_mels=8, hop=0.02)
_OTHER_TAKES = r"(?P<label>\d+)_(?P<speaker>[^_]+)_(?P<take>[013])\.wav"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    generator = torch.Generator().manual_seed(0)
    for speaker in ("ann", "bob", "cid"):
        for digit in range(3):
            for take in range(4):
                wave = torch.rand(400, generator=generator) - 0.5
                soundfile.write(root / f"{digit}_{speaker}_{take}.wav", wave.numpy(), RATE)
    return root


def section(root, **fields):
    given = {"root": root, "target": "cid", "shots": 3, "held_out_takes": (0, 1), "features": FEATURES}
    return StringsData(**given | {"strings": 4, "held_out": 2, "target_strings": 5} | fields)


def test_strings_have_the_words_of_their_recordings_and_as_many_as_asked(root):
    data = section(root)
    domains = load(data, seed=0)
    assert [len(part) for part in (domains.shots, domains.target_test, domains.source_train, domains.source_test)] == [
        *(3, 5, 8, 4)
    ]
    assert set(domains.labels) == {"<blank>", "|", *"zerontw"}
    for name in domains.target_test.names:
        assert 3 <= len(name.partition("/")[2].split()[1:]) <= 7
    assert speakers(data) == ("ann", "bob", "cid")


def test_shots_change_with_the_seed_and_the_test_part_does_not(root):
    first, second = (load(section(root), seed=seed) for seed in (0, 1))
    assert first.shots.names != second.shots.names
    assert first.target_test.names == second.target_test.names
    assert load(section(root), seed=0).shots.names == first.shots.names
    assert len(load(section(root, validation=0.4), seed=0).validation) == 1


@pytest.mark.parametrize(
    "change", [{"held_out_takes": (2, 3)}, {"gap": (0.05, 0.2)}, {"words": (3, 6)}, {"pattern": _OTHER_TAKES}], ids=str
)
def test_a_source_model_is_trained_anew_if_its_strings_have_other_recordings_or_gaps(root, change):
    """Names of strings and texts may be the same: words are drawn before their recordings."""

    def fingerprint(data):
        domains = load(data, seed=0)
        return Transcribe().fingerprint(data, domains.source_train, domains.preprocessing)

    usual = fingerprint(section(root))
    assert fingerprint(section(root, shots=2)) == usual
    assert fingerprint(section(root, **change)) != usual


def test_no_recording_is_in_a_training_string_and_a_test_string(root):
    from conservtl.tasks.speech.folder import FREE_SPOKEN_DIGITS, search

    found = search(root, FREE_SPOKEN_DIGITS, (0, 1))[0]
    used = {
        held_out: {
            one.name
            for strung in strings_of(
                [one for one in found if one.held_out == held_out],
                "name",
                20,
                words=(3, 7),
                gap=(0.0, 0.1),
                text=Normalisation(),
            ).values()
            for one in strung.recordings
        }
        for held_out in (False, True)
    }
    assert used[True]
    assert not used[True] & used[False]


def test_the_samples_are_the_words_with_gaps_between_them(root):
    """By hand: gaps of 0.1, 0.2 and 0.1 s around two words of 400 samples, at 2 kHz."""
    from conservtl.tasks.speech.recordings import Recording

    words = tuple(Recording(str(root / f"{digit}_ann_0.wav"), str(digit), "ann") for digit in (0, 1))
    wave, rate = joined(Strung(words, (0.1, 0.2, 0.1), 7), RATE)
    assert (len(wave), rate) == (200 + 400 + 400 + 400 + 200, RATE)
    assert wave[200:600].abs().max() == pytest.approx(0.5, abs=0.01)
    assert wave[:200].abs().max() < 0.01
    assert wave[600:1000].abs().max() < 0.01
    assert torch.equal(joined(Strung(words, (0.1, 0.2, 0.1), 7), RATE)[0], wave)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "dee"}, r"data\.target must be a speaker.*'ann', 'bob', 'cid'"),
        ({"source_speakers": ("cid",)}, r"data\.source_speakers must not contain data\.target; received 'cid'"),
        ({"held_out_takes": (0, 1, 2, 3)}, "there is no recording for 'cid shots 0'"),
    ],
)
def test_contradictions_are_refused(root, fields, message):
    with pytest.raises(ctl.DataError, match=message):
        load(section(root, **fields), seed=0)


def test_bounds_in_the_wrong_order_are_refused(root):
    with pytest.raises(ValueError, match=r"words must be the lower and the upper bound; received 7 and 3"):
        section(root, words=(7, 3))


def test_sentences_are_different_and_need_the_english_alphabet_alone():
    found = sentences("voice", 200)
    assert len(set(found)) == 200
    data = GrammarData()
    vocabulary = data.tokens.vocabulary(())
    for sentence in found:
        assert data.tokens.decode(data.tokens.encode(sentence, vocabulary), vocabulary) == sentence
        assert data.text(sentence) == sentence


def test_a_voice_is_synthesised_when_an_input_is_needed_and_not_before():
    pytest.importorskip("espeakng_loader")
    data = GrammarData(voices=("en-us", "nobody"), sentences=1, held_out=1, target_sentences=2, shots=1)
    domains = load(data, seed=0)
    assert domains.shots.inputs[0].shape[1] == 40
    with pytest.raises(ctl.DataError, match="nobody"):
        domains.source_train.batch([0])
    with pytest.raises(ctl.SpecError, match=r"data\.voices must not contain data\.target"):
        load(GrammarData(voices=("de+f4",)), seed=0)


def test_a_spoken_utterance_can_be_played():
    """Its recording is the one that the input was made of, though it is synthesised again."""
    pytest.importorskip("espeakng_loader")
    domains = load(GrammarData(voices=("en-us", "en-gb"), sentences=1, held_out=1, target_sentences=3, shots=1), seed=0)
    inputs = domains.target_test.inputs
    made = inputs[1]
    wave, rate = inputs.wave(1)
    assert wave.shape[0] > rate / 2
    assert torch.equal(inputs.features(wave, rate), made)
