"""Specs of speech data, and loading of the two domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import Field, model_validator
from torch import Tensor

from conservtl.bounds import Count, NonNegativeInt, Place, ProperShare
from conservtl.data import Domains
from conservtl.data.shots import Shots
from conservtl.errors import DataError, SpecError
from conservtl.tasks.audio.espeak import DIGITS, SOURCE_VOICES, TARGET_VOICES, speak, takes_of
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.speakers import Text, check_target
from conservtl.tasks.bad_files import FileData, FolderFiles, bad_among, explained, names_below
from conservtl.tasks.classification import ClassData
from conservtl.tasks.speech.augment import SpeechAugment
from conservtl.tasks.speech.features import Features, SpeechPreprocessing
from conservtl.tasks.speech.folder import FREE_SPOKEN_DIGITS, search, speech_commands_recordings
from conservtl.tasks.speech.recordings import Protocol, Recording, domains, find_copies

__all__ = ["DataSpec", "EspeakData", "FolderData", "SpeechCommandsData", "load", "speakers"]

# Mild: stronger augmentation lowers the compact network's accuracy on source and target.
_SOURCE_AUGMENT = SpeechAugment(
    time_shift=0.1,
    time_stretch=0.12,
    frequency_shift=0.03,
    frequency_stretch=0.1,
    tilt=0.1,
    noise=0.1,
)

Words = Annotated[tuple[Text, ...], MinLen(2)]


class _SpeechData(ClassData):
    """Fields of all kinds of speech data."""

    shots: Shots = 5
    """Recordings of each word by the target speaker for adaptation: a number, ``{up_to: 5}`` or ``all``; the others are
    the test part. ``all`` and ``up_to`` leave one recording of each word that has two to test on."""
    validation: ProperShare = 0.0
    """Share of the shots for validation instead of training; 0 with one shot."""
    features: Features = Features()
    """Conversion of a recording to an input of the network."""
    augment: SpeechAugment | None = SpeechAugment()
    """Augmentation of the shots during adaptation; null for none."""
    proxies: SpeechAugment | None = None
    """Changes that turn the shots into recordings as of other speakers, on which strategies compare the model with the
    source; null: they compare on the shots as augmented."""
    source_augment: SpeechAugment | None = _SOURCE_AUGMENT
    """Augmentation of the source's recordings while a source model is trained; null for none."""

    @model_validator(mode="after")
    def _on_samples(self) -> _SpeechData:
        for name in ("augment", "source_augment", "proxies"):
            waves = getattr(getattr(self, name), "waves", None)
            if waves is not None and self.features.kind != "waveform":
                raise ValueError(
                    f"{name}.waves changes samples, and features.kind is {self.features.kind!r}, of which spectra are "
                    "computed once. Set features.kind to waveform, or leave waves out"
                )
            if "babble" in getattr(getattr(waves, "noise", None), "colours", ()):
                raise ValueError(f"{name}.waves.noise.colours: a babble is for utterances. Take white, pink, or files")
        return self

    def protocol(
        self, target: str, seed: int, speakers: tuple[str, ...] | None, limit: int | None, *, source: bool
    ) -> Protocol:
        """Return the split of speakers and recordings."""
        return Protocol(target, self.shots, self.validation, seed, speakers, limit, source)


class FolderData(_SpeechData, FolderFiles):
    """Recordings below a folder, labelled by their file names."""

    kind: Literal["folder"] = "folder"
    """Recordings in files, labelled by a pattern."""
    root: Place
    """The folder; its subfolders are searched too."""
    pattern: str = FREE_SPOKEN_DIGITS
    """Regular expression for the end of a file's path, with the groups `label`, `speaker` and optionally `take`. The
    default matches free spoken digits, `{label}_{speaker}_{take}.wav`; the case of the extension does not matter."""
    target: Text
    """The speaker to whom the model is adapted."""
    source_speakers: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """The speakers of the source model; null for all but the target."""
    held_out_takes: tuple[NonNegativeInt, ...] = (0, 1, 2, 3, 4)
    """Takes of the source speakers that form the source's test part; never trained on. Empty: there is none."""
    words: Words | None = None
    """Labels to use; null for all."""
    limit: Count | None = None
    """Largest number of source recordings of each word, for training and for testing each; null for all."""


class EspeakData(_SpeechData):
    """Synthetic speakers: espeak-ng's voices, the same in every run."""

    kind: Literal["espeak"] = "espeak"
    """Synthetic recordings of espeak-ng."""
    target: str = TARGET_VOICES[0]
    """The voice to which the model is adapted, by its name in espeak-ng: `de+f4` is German, fourth female variant."""
    voices: Annotated[tuple[str, ...], Field(min_length=1)] = SOURCE_VOICES
    """The voices of the source model."""
    words: Words = DIGITS
    """The words they say."""
    takes: Annotated[int, Field(ge=1, le=1000)] = 6
    """Recordings of each word by each source voice for training, with different rates and pitches."""
    held_out: Annotated[int, Field(ge=1, le=1000)] = 2
    """Further recordings of each word by each source voice, for the source's test part."""
    target_takes: Annotated[int, Field(ge=2, le=1000)] = 25
    """Recordings of each word by the target voice, shots and test part together."""


class SpeechCommandsData(_SpeechData, FileData):
    """Speech Commands (Warden, 2018) in the folders that torchaudio unpacks; nothing is downloaded."""

    kind: Literal["speechcommands"] = "speechcommands"
    """Speech Commands, read by torchaudio."""
    root: Place
    """The folder that contains `SpeechCommands/speech_commands_v0.02`."""
    version: Literal["speech_commands_v0.01", "speech_commands_v0.02"] = "speech_commands_v0.02"
    """Release of the set."""
    target: Text
    """The speaker to whom the model is adapted: the eight hexadecimal digits before `_nohash_`."""
    source_speakers: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """The speakers of the source model; null for all but the target."""
    held_out: ProperShare = 0.1
    """Share of the source's recordings that forms its test part, the same in every run."""
    words: Words | None = None
    """Labels to use; null for all."""
    limit: Count | None = None
    """Largest number of source recordings of each word, for training and for testing each; null for all."""


DataSpec = Annotated[FolderData | EspeakData | SpeechCommandsData, Field(discriminator="kind")]
"""Spec of speech data, selected by ``kind``."""


def load(data: FolderData | EspeakData | SpeechCommandsData, *, seed: int, source: bool = True) -> Domains:
    """Read the recordings of a spec and split them into the two domains.

    The shots depend on ``seed``. The source's test part does not, so that a source model that was trained once is never
    tested on its training recordings. Without ``source`` the source's recordings are not read, and its parts are None.

    Raises:
        DataError: recordings are missing, unreadable, or contradict the spec.
        SpecError: the pattern is invalid, or the espeak-ng voices contradict each other.
        MissingExtraError: an optional dependency is missing.
    """
    if isinstance(data, EspeakData):
        return _load_espeak(data, seed, source=source)
    recordings, notes, bad = _recordings(data)
    check_target(data.target, {r.speaker for r in recordings}, bad)
    used = [r for r in recordings if r.speaker == data.target or _is_source(r, data, source=source)]
    bad = bad_among(data, bad, (Path(r.name) for r in used), read_audio, "audio")
    recordings = [r for r in recordings if Path(r.name) not in bad]
    if isinstance(data, FolderData):
        _check_held_out(data, [r for r in used if r.speaker != data.target])
    skipped = names_below(data.root, bad)
    preprocessing = SpeechPreprocessing(features=data.features)
    digests: dict[str, str] = {}
    with explained(skipped):
        split = domains(
            recordings,
            data.protocol(data.target, seed, data.source_speakers, data.limit, source=source),
            lambda chosen: preprocessing.read([Path(r.name) for r in chosen], digests),
            preprocessing,
            **_augmentations(data),
        )
    if isinstance(data, FolderData):  # a published set is as it is
        notes += find_copies(recordings, digests, data.target)
    return replace(split, notes=notes, skipped=skipped)


def _is_source(recording: Recording, data: FolderData | SpeechCommandsData, *, source: bool) -> bool:
    return source and (data.source_speakers is None or recording.speaker in data.source_speakers)


def speakers(data: FolderData | EspeakData | SpeechCommandsData) -> tuple[str, ...]:
    """Return the possible targets: every speaker of the recordings, or the target voices of espeak-ng."""
    if isinstance(data, EspeakData):
        return TARGET_VOICES
    return tuple(sorted({recording.speaker for recording in _recordings(data)[0]}))


def _recordings(
    data: FolderData | SpeechCommandsData,
) -> tuple[list[Recording], tuple[str, ...], dict[Path, str]]:
    if isinstance(data, SpeechCommandsData):
        recordings = speech_commands_recordings(data.root, data.version, data.held_out, data.words)
        return recordings, (), {}
    return search(data.root, data.pattern, data.held_out_takes, data.words, follow_links=data.follow_links)


def _check_held_out(data: FolderData, source: Sequence[Recording]) -> None:
    """Raise if takes are to be held out, and the source has none of them."""
    if source and data.held_out_takes and not any(recording.held_out for recording in source):
        takes = sorted({recording.take for recording in source})
        raise DataError(
            f"data.held_out_takes must name takes of the source's speakers; received {list(data.held_out_takes)}, and "
            f"theirs are {takes[0]} to {takes[-1]}. Name some of them, such as [{takes[0]}], to test on what the "
            "source keeps, or [] to test on nothing of it."
        )


def _check_voices(data: EspeakData) -> None:
    if data.target in data.voices:
        raise SpecError(
            f"data.voices must not contain data.target; received {data.target!r} in both. Remove it from data.voices."
        )
    if isinstance(data.shots, int) and data.target_takes <= data.shots:
        raise SpecError(
            f"data.target_takes must be larger than data.shots, to leave recordings for testing; received "
            f"{data.target_takes} and {data.shots}. Raise data.target_takes."
        )


def _load_espeak(data: EspeakData, seed: int, *, source: bool) -> Domains:
    _check_voices(data)
    utterances = takes_of(data.target, data.words, data.target_takes)
    for voice in data.voices:
        utterances += takes_of(voice, data.words, data.takes + data.held_out)
    by_name = {f"{u.voice}/{u.word}/{u.take}": u for u in utterances}
    recordings = [
        Recording(name, u.word, u.voice, held_out=u.voice != data.target and u.take >= data.takes)
        for name, u in by_name.items()
    ]
    preprocessing = SpeechPreprocessing(features=data.features)

    def read(chosen: Sequence[Recording]) -> Tensor:
        return preprocessing.transform(speak([by_name[r.name] for r in chosen]))

    protocol = data.protocol(data.target, seed, data.voices, None, source=source)
    return domains(recordings, protocol, read, preprocessing, **_augmentations(data))


def _augmentations(data: _SpeechData) -> dict[str, SpeechAugment | None]:
    """Return the augmentations of the shots and of the source, and the proxies, at the features' sample rate."""
    rate = data.features.sample_rate
    given = {
        "augmentation": data.augment,
        "source_augmentation": data.source_augment,
        "proxies": data.proxies,
    }
    return {name: None if one is None else one.at(rate) for name, one in given.items()}
