"""Recordings by the pattern of their names, and the protocol of the two domains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from conservtl.errors import DataError, SpecError
from conservtl.tasks.audio.noise import RecordedNoise, SyntheticNoise
from conservtl.tasks.audio.rooms import SyntheticRoom
from conservtl.tasks.audio.waves import WaveAugment
from conservtl.tasks.bad_files import refuse
from conservtl.tasks.speech import SPEECH_COMMANDS, DataSpec, EspeakData, FolderData, SpeechCommandsData, load
from conservtl.tasks.speech.folder import in_held_out_part, search
from conservtl.tasks.speech.recordings import Protocol, Recording, domains

soundfile = pytest.importorskip("soundfile")

FSDD = Path(__file__).resolve().parents[4] / "shared" / "data" / "fsdd"
needs_digits = pytest.mark.skipif(not FSDD.is_dir(), reason="free spoken digits are not beside the checkout")


def tone(file: Path, hertz: float = 440.0, seconds: float = 0.2, rate: int = 8000) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, torch.sin(torch.arange(int(rate * seconds)) * hertz * 6.2832 / rate).numpy() / 2, rate)
    return file


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Three speakers, two words, ten takes each, as free spoken digits names them."""
    for speaker in range(3):
        for word in range(2):
            for take in range(10):
                tone(tmp_path / f"{word}_s{speaker}_{take}.wav", 200 + 100 * word + 30 * speaker + take)
    return tmp_path


def folder(where: Path, **fields: object) -> FolderData:
    return FolderData.model_validate({"root": where, "target": "s0", "shots": 3, **fields})


def speaker_of(name: str) -> str:
    return Path(name).stem.split("_")[1]


def take_of(name: str) -> int:
    return int(Path(name).stem.split("_")[2])


def test_source_and_target_speakers_are_disjoint(digits):
    got = load(folder(digits), seed=0)
    own = {*got.shots.names, *got.target_test.names}
    others = {*got.source_train.names, *got.source_test.names}
    assert {speaker_of(n) for n in own} == {"s0"}
    assert {speaker_of(n) for n in others} == {"s1", "s2"}
    assert (len(got.shots), len(got.target_test)) == (6, 14)
    assert not set(got.shots.names) & set(got.target_test.names)


def test_held_out_takes_are_never_trained_on(digits):
    got = load(folder(digits), seed=0)
    assert {take_of(n) for n in got.source_test.names} == {0, 1, 2, 3, 4}
    assert {take_of(n) for n in got.source_train.names} == {5, 6, 7, 8, 9}


def test_labels_are_the_names_of_the_words_in_order(digits):
    got = load(folder(digits), seed=0)
    assert got.labels == got.source_labels == ("0", "1")
    for part in (got.shots, got.target_test, got.source_train, got.source_test):
        assert [int(Path(n).name[0]) for n in part.names] == part.labels.tolist()
        assert part.inputs.shape == (len(part), 40, 51)


def test_shots_follow_the_seed_and_the_source_does_not(digits):
    first, again, other = (load(folder(digits), seed=seed) for seed in (0, 0, 1))
    assert first.shots.names == again.shots.names != other.shots.names
    assert torch.equal(first.shots.inputs, again.shots.inputs)
    assert first.source_train.names == other.source_train.names
    assert first.source_test.names == other.source_test.names


def test_source_left_unread_changes_nothing_of_the_target(digits):
    whole, half = load(folder(digits), seed=0), load(folder(digits), seed=0, source=False)
    assert half.source_train is None
    assert half.source_test is None
    assert half.shots.names == whole.shots.names
    assert half.source_labels == whole.source_labels


def test_validation_is_carved_from_the_shots(digits):
    got = load(folder(digits, shots=4, validation=0.25), seed=0)
    assert (len(got.shots), len(got.validation), len(got.target_test)) == (6, 2, 12)
    parts = [set(p.names) for p in (got.shots, got.validation, got.target_test)]
    assert len(set.union(*parts)) == 20


def test_one_shot_has_no_validation(digits):
    got = load(folder(digits, shots=1, validation=0.5), seed=0)
    assert got.validation is None
    assert len(got.shots) == 2


def test_source_speakers_can_be_named(digits):
    got = load(folder(digits, source_speakers=["s2"]), seed=0)
    assert {speaker_of(n) for n in got.source_train.names} == {"s2"}


def test_limit_is_a_word(digits):
    got = load(folder(digits, limit=3), seed=0)
    assert got.source_train.labels.bincount().tolist() == [3, 3]
    assert got.source_test.labels.bincount().tolist() == [3, 3]


def test_without_held_out_takes_nothing_measures_what_is_kept(digits):
    got = load(folder(digits, held_out_takes=[]), seed=0)
    assert got.source_test is None
    assert len(got.source_train) == 40


def test_pattern_without_takes_numbers_them_by_name(tmp_path):
    for name in ("c", "a", "b"):
        tone(tmp_path / "yes" / f"ann-{name}.wav")
    found, _, _ = search(tmp_path, r"(?P<label>\w+)/(?P<speaker>\w+)-\w\.wav", held_out_takes=[0])
    assert [(Path(r.name).stem, r.held_out) for r in found] == [
        ("ann-a", True),
        ("ann-b", False),
        ("ann-c", False),
    ]


def test_pattern_of_speech_commands(tmp_path):
    tone(tmp_path / "deep" / "seven" / "0a7c_nohash_3.wav")
    tone(tmp_path / "deep" / "_background_noise_" / "hum.wav")
    ((only,), _, _) = search(tmp_path, SPEECH_COMMANDS, held_out_takes=[3])
    assert (only.label, only.speaker, only.held_out) == ("seven", "0a7c", True)


def test_pattern_must_match_a_whole_name(tmp_path):
    tone(tmp_path / "x7_theo_1.wav")
    with pytest.raises(DataError, match=r"x7_theo_1\.wav"):
        refuse(search(tmp_path, FolderData.model_fields["pattern"].default, [])[2])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?P<label>\d+)_\w+\.wav", r"no 'speaker'.*\(\?P<speaker>"),
        (r"(?P<speaker>\d+)_\w+\.wav", "no 'label'"),
        (r"(?P<label>\d+", "regular expression"),
        (r"(?P<label>a)(?P<speaker>b)(?P<room>c)", "room"),
    ],
)
def test_pattern_is_checked(tmp_path, pattern, message):
    with pytest.raises(SpecError, match=message):
        load(folder(tmp_path, pattern=pattern), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"root": "nowhere"}, r"data\.root.*nowhere"),
        ({"pattern": r"(?P<label>\d)-(?P<speaker>\w+)\.wav"}, r"data\.pattern.*0_s0_0\.wav"),
        ({"pattern": r"(?P<label>\d)_(?P<take>\w+)_(?P<speaker>\d+)\.wav"}, r"'take' must match a number.*'s0'"),
        ({"target": "ann"}, r"data\.target.*'ann'.*'s0', 's1', 's2'"),
        ({"shots": 10}, r"data\.shots: 's0' has 10 recordings of '0'.*at most 9"),
        ({"source_speakers": ["s0"]}, r"data\.source_speakers must not contain data\.target; received 's0'"),
        ({"source_speakers": ["bob"]}, r"'bob'.*'s1', 's2'"),
        ({"words": ["0", "eleven"]}, r"data\.words.*eleven"),
        ({"held_out_takes": list(range(10))}, "held out"),
        ({"held_out_takes": [10, 11]}, r"received \[10, 11\], and theirs are 0 to 9\. .*such as \[0\]"),
    ],
)
def test_errors_say_what_to_do(digits, fields, message):
    with pytest.raises(DataError, match=message):
        load(folder(digits, **fields), seed=0)


def test_target_must_say_every_word_of_the_source(digits):
    tone(digits / "2_s1_5.wav")
    with pytest.raises(DataError, match=r"'s0' has no recording of '2'.*data\.words"):
        load(folder(digits), seed=0)
    assert load(folder(digits, words=["0", "1"]), seed=0).labels == ("0", "1")


def test_a_lone_speaker_has_no_source(tmp_path):
    for take in range(4):
        tone(tmp_path / f"0_s0_{take}.wav", 440 + take)
    with pytest.raises(DataError, match="only speaker"):
        load(folder(tmp_path), seed=0)
    assert load(folder(tmp_path), seed=0, source=False).source_labels == ("0",)


def test_unreadable_audio_is_named(digits):
    (digits / "1_s1_7.wav").write_bytes(b"not audio")
    with pytest.raises(DataError, match=r"1_s1_7\.wav cannot be read"):
        load(folder(digits), seed=0)


def test_speech_commands_of_torchaudio(tmp_path):
    pytest.importorskip("torchaudio")
    base = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for word in ("yes", "no"):
        for speaker in ("aa11", "bb22", "cc33"):
            for take in range(6):
                tone(base / word / f"{speaker}_nohash_{take}.wav", rate=16000)
    tone(base / "_background_noise_" / "hum_nohash_0.wav")
    spec = SpeechCommandsData(root=tmp_path, target="bb22", shots=2, held_out=0.3)
    got = load(spec, seed=0)
    assert got.labels == ("no", "yes")
    assert (len(got.shots), len(got.target_test)) == (4, 8)
    assert len(got.source_train) + len(got.source_test) == 24
    assert 0 < len(got.source_test) < 16
    assert got.source_test.names == load(spec, seed=5).source_test.names


def test_speech_commands_missing(tmp_path):
    pytest.importorskip("torchaudio")
    with pytest.raises(DataError, match=r"speech_commands_v0\.02"):
        load(SpeechCommandsData(root=tmp_path, target="x"), seed=0)


@given(st.floats(0, 1), st.text())
def test_held_out_parts_are_nested(part, name):
    """What a smaller part holds out, a larger one does too."""
    assert not in_held_out_part(name, part / 2) or in_held_out_part(name, part)


@settings(max_examples=30, deadline=None)
@given(
    speakers=st.integers(2, 4),
    words=st.integers(1, 4),
    takes=st.integers(3, 7),
    shots=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_every_recording_is_in_one_part(speakers, words, takes, shots, seed):
    found = [
        Recording(f"{w}/{s}/{t}", f"w{w}", f"s{s}", held_out=t == 0)
        for w in range(words)
        for s in range(speakers)
        for t in range(takes)
    ]
    got = domains(found, Protocol("s0", shots, 0.5, seed), lambda some: torch.zeros(len(some), 1), None, None, None)
    parts = [got.shots, got.validation, got.target_test, got.source_train, got.source_test]
    names = [name for part in parts if part is not None for name in part.names]
    assert sorted(names) == sorted(r.name for r in found)


def test_kind_picks_the_spec():
    spec = TypeAdapter(DataSpec).validate_python({"kind": "folder", "root": "x", "target": "theo"})
    assert isinstance(spec, FolderData)
    assert spec.held_out_takes == (0, 1, 2, 3, 4)
    with pytest.raises(ValidationError, match="shotz"):
        TypeAdapter(DataSpec).validate_python({"kind": "folder", "root": "x", "target": "theo", "shotz": 1})


def test_a_shot_is_never_a_test_example_under_another_name(digits):
    """A copy is found by its samples: in another format, with other bytes."""
    wave, rate = soundfile.read(digits / "1_s0_3.wav", dtype="int16")
    soundfile.write(digits / "1_s0_77.flac", wave, rate)
    with pytest.raises(DataError, match=r"1_s0_77\.flac has the same samples as .*1_s0_3\.wav.*Remove the copies"):
        load(folder(digits), seed=0)


def test_copies_between_the_parts_of_the_source_are_refused(digits):
    (digits / "1_s1_66.wav").write_bytes((digits / "1_s1_2.wav").read_bytes())  # take 2 is held out
    with pytest.raises(DataError, match=r"1_s1_66\.wav has the same samples"):
        load(folder(digits), seed=0)


def test_copies_of_the_target_in_the_source_are_refused(digits):
    (digits / "1_s1_66.wav").write_bytes((digits / "1_s0_6.wav").read_bytes())
    with pytest.raises(DataError, match="has the same samples"):
        load(folder(digits), seed=0)


def test_copies_that_are_only_trained_on_are_counted(digits):
    (digits / "1_s1_66.wav").write_bytes((digits / "1_s1_7.wav").read_bytes())
    got = load(folder(digits), seed=0)
    assert got.notes == ("copies in the source's training part: 1 recording",)


@pytest.mark.parametrize("name", ["0_s0_77.WAV", "0_s0_77.Wav", "0_s0_77.FLAC"])
def test_the_case_of_an_extension_does_not_matter(digits, name):
    tone(digits / "low.wav", 777).rename(digits / "low")  # soundfile knows formats by their lower-case names
    (digits / "low").rename(digits / name)
    got = load(folder(digits), seed=0)
    assert name in {Path(n).name for n in (*got.shots.names, *got.target_test.names)}
    assert got.notes == ()


def test_a_pattern_may_name_any_format(digits):
    for take in range(3):
        tone(digits / f"0_s0_{80 + take}.ogg", 900 + 50 * take)
        tone(digits / f"0_s0_{90 + take}.mp3", 1300 + 50 * take, rate=16000)
    pattern = r"(?P<label>\d+)_(?P<speaker>[^_/]+)_(?P<take>\d+)\.(WAV|mp3|ogg)"
    got = load(folder(digits, pattern=pattern), seed=0)
    assert len(got.shots) + len(got.target_test) == 26
    assert got.notes == ()


def test_files_that_do_not_match_are_counted(digits):
    tone(digits / "0_s0_80.ogg", 900)
    tone(digits / "0_s0_81.mp3", 950, rate=16000)
    tone(digits / "room" / "door.wav", 90)
    tone(digits / ".trash" / "0_s0_99.wav", 91)  # hidden
    (note,) = load(folder(digits), seed=0).notes
    assert note.startswith("3 of 63 audio files do not match data.pattern and are left out (1 .mp3, 1 .ogg, 1 .wav)")


def test_composed_and_decomposed_letters_are_the_same(tmp_path):
    """A speaker named by one system and listed by another; the spec is written by a third."""
    for number in range(8):
        speaker = "J\u00f6rg" if number % 2 else "Jo\u0308rg"
        for place, word in enumerate(("gr\u00fcn" if number % 3 else "gru\u0308n", "rot")):
            tone(tmp_path / f"{word}_{speaker}_{number}.wav", 200 + 7 * number + 100 * place)
            tone(tmp_path / f"{word}_ann_{number}.wav", 600 + 7 * number + 100 * place)
    pattern = r"(?P<label>\w+)_(?P<speaker>\w+)_(?P<take>\d+)\.wav"
    for spelling in ("J\u00f6rg", "Jo\u0308rg"):
        got = load(folder(tmp_path, pattern=pattern, target=spelling, words=["gru\u0308n", "rot"]), seed=0)
        assert got.labels == got.source_labels == ("gr\u00fcn", "rot")
        assert (len(got.shots), len(got.target_test), len(got.source_train)) == (6, 10, 6)


for kind in (FolderData, EspeakData, SpeechCommandsData):
    kind.model_rebuild()  # hypothesis reads the fields from the signature, which is built late
PLACES = st.sampled_from([Path("recordings"), Path("/data/digits")])
st.register_type_strategy(Path, PLACES)


def ranges(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair), max(pair)))


ROOMS = st.builds(SyntheticRoom, rt60=ranges(0.01, 10), direct=ranges(-40, 100))
NOISES = st.builds(SyntheticNoise, snr=ranges(-40, 100)) | st.builds(RecordedNoise, root=PLACES, snr=ranges(-40, 100))
SPEEDS = st.lists(st.floats(0.5, 2), min_size=1, max_size=4).map(tuple)
WAVES = st.builds(WaveAugment, speeds=SPEEDS, room=st.none() | ROOMS, noise=st.none() | NOISES)
st.register_type_strategy(WaveAugment, st.none())  # others only beside features on samples


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.from_type(FolderData) | st.from_type(EspeakData) | st.from_type(SpeechCommandsData))
def test_any_spec_survives_json(spec):
    """Bounds are in the types but for the order of two numbers, so that every spec drawn from them is one."""
    assert TypeAdapter(DataSpec).validate_json(spec.model_dump_json()) == spec


@given(WAVES)
def test_any_change_of_recordings_survives_json(waves):
    assert WaveAugment.model_validate_json(waves.model_dump_json()) == waves


@needs_digits
def test_free_spoken_digits():
    got = load(FolderData(root=FSDD, target="theo", limit=20), seed=0)
    assert got.labels == tuple("0123456789")
    assert (len(got.shots), len(got.target_test), len(got.source_train), len(got.source_test)) == (
        50,
        450,
        200,
        150,
    )
    assert {take_of(n) for n in got.source_test.names} == {0, 1, 2, 3, 4}
    assert got.source_train.inputs.isfinite().all()
