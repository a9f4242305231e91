"""Where recordings come from, as a spec, and how they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import Field
from torch import Tensor

from conservtl.bounds import Count, NonNegativeInt, ProperShare
from conservtl.data import Domains
from conservtl.errors import SpecError
from conservtl.spec_model import FrozenModel
from conservtl.tasks.speech.augment import SpeechAugment
from conservtl.tasks.speech.espeak import DIGITS, SOURCE_VOICES, TARGET_VOICES, speak, takes_of
from conservtl.tasks.speech.features import Features, SpeechPreprocessing
from conservtl.tasks.speech.folder import FREE_SPOKEN_DIGITS, find_recordings, speech_commands_recordings
from conservtl.tasks.speech.recordings import Protocol, Recording, domains

__all__ = ["DataSpec", "EspeakData", "FolderData", "SpeechCommandsData", "load", "speakers"]

# Mild: stronger changes cost the compact network accuracy on source and target alike.
_SOURCE_AUGMENT = SpeechAugment(
    time_shift=0.1,
    time_stretch=0.12,
    frequency_shift=0.03,
    frequency_stretch=0.1,
    tilt=0.1,
    noise=0.1,
)

Words = Annotated[tuple[str, ...], MinLen(2)]


class _SpeechData(FrozenModel):
    """What all kinds of recordings share."""

    shots: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Recordings a word of the target speaker to adapt with; the rest is its test part."""
    validation: ProperShare = 0.0
    """Part of the shots to validate on instead of training; with one shot there is none."""
    features: Features = Features()
    """How a recording becomes an input of the network."""
    augment: SpeechAugment | None = SpeechAugment()
    """Random changes of the shots while adapting; null for none."""
    source_augment: SpeechAugment | None = _SOURCE_AUGMENT
    """Random changes of the source's recordings while a source model is trained; null for none."""

    def protocol(
        self, target: str, seed: int, speakers: tuple[str, ...] | None, limit: int | None, *, source: bool
    ) -> Protocol:
        """Who adapts, on how much, and who is the source."""
        return Protocol(target, self.shots, self.validation, seed, speakers, limit, source)


class FolderData(_SpeechData):
    """Recordings under a folder, labelled by the names of their files."""

    kind: Literal["folder"] = "folder"
    """Recordings in files."""
    root: Path
    """The folder; all below it is searched."""
    pattern: str = FREE_SPOKEN_DIGITS
    """Regular expression for the end of a file's path, with the groups `label`, `speaker` and, where
    there is one, `take`. The default fits free spoken digits, `{label}_{speaker}_{take}.wav`."""
    target: str
    """The speaker to adapt to."""
    source_speakers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """The speakers of the source model; all others found where null."""
    held_out_takes: tuple[NonNegativeInt, ...] = (0, 1, 2, 3, 4)
    """Takes of the source speakers that measure what is kept; never trained on."""
    words: Words | None = None
    """Labels to use; all found where null."""
    limit: Count | None = None
    """Most source recordings a word to train on, and to test on; all where null."""


class EspeakData(_SpeechData):
    """Synthetic speakers: espeak-ng's voices, embedded, the same at every run."""

    kind: Literal["espeak"] = "espeak"
    """Synthetic recordings."""
    target: str = TARGET_VOICES[0]
    """The voice to adapt to, as espeak-ng names it: `de+f4` is the German voice, fourth female variant."""
    voices: Annotated[tuple[str, ...], Field(min_length=1)] = SOURCE_VOICES
    """The voices of the source model."""
    words: Words = DIGITS
    """What they say."""
    takes: Annotated[int, Field(ge=1, le=1000)] = 6
    """Recordings of a word by each source voice to train on, each at its own rate and pitch."""
    held_out: Annotated[int, Field(ge=1, le=1000)] = 2
    """As many more, to measure what is kept."""
    target_takes: Annotated[int, Field(ge=2, le=1000)] = 25
    """Recordings of a word by the target voice, shots and test part together."""


class SpeechCommandsData(_SpeechData):
    """Speech Commands (Warden, 2018), laid out as torchaudio unpacks it; nothing is downloaded."""

    kind: Literal["speechcommands"] = "speechcommands"
    """torchaudio's SPEECHCOMMANDS."""
    root: Path
    """The folder that holds `SpeechCommands/speech_commands_v0.02`."""
    version: Literal["speech_commands_v0.01", "speech_commands_v0.02"] = "speech_commands_v0.02"
    """Which release."""
    target: str
    """The speaker to adapt to: the eight hexadecimal digits before `_nohash_`."""
    source_speakers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """The speakers of the source model; all others found where null."""
    held_out: ProperShare = 0.1
    """Part of the source's recordings that measures what is kept: always the same one."""
    words: Words | None = None
    """Labels to use; all found where null."""
    limit: Count | None = None
    """Most source recordings a word to train on, and to test on; all where null."""


DataSpec = Annotated[FolderData | EspeakData | SpeechCommandsData, Field(discriminator="kind")]
"""Recordings of words by several speakers, one of them the target."""


def load(data: FolderData | EspeakData | SpeechCommandsData, *, seed: int, source: bool = True) -> Domains:
    """Read what a spec names and split it into the two domains.

    The shots are drawn by ``seed``; which recordings of the source are held out does not depend on it,
    so a source model trained once is never tested on what it was trained on.

    Args:
        data: the spec.
        seed: draws the shots and the validation part.
        source: False reads no recording of the source; ``source_train`` and ``source_test`` are None.

    Raises:
        DataError: recordings are missing, unreadable, or contradict the spec.
        SpecError: the pattern is none, or the espeak-ng voices contradict each other.
        MissingExtraError: an optional dependency is needed.
    """
    if isinstance(data, EspeakData):
        return _load_espeak(data, seed, source=source)
    found = _recordings(data)
    preprocessing = SpeechPreprocessing(features=data.features)
    return domains(
        found,
        data.protocol(data.target, seed, data.source_speakers, data.limit, source=source),
        lambda recordings: preprocessing.read([Path(r.name) for r in recordings]),
        preprocessing,
        data.augment,
        data.source_augment,
    )


def speakers(data: FolderData | EspeakData | SpeechCommandsData) -> tuple[str, ...]:
    """Who can be the target: every speaker found, or the embedded voices.

    Raises:
        DataError: recordings are missing.
    """
    if isinstance(data, EspeakData):
        return TARGET_VOICES
    return tuple(sorted({recording.speaker for recording in _recordings(data)}))


def _recordings(data: FolderData | SpeechCommandsData) -> list[Recording]:
    if isinstance(data, SpeechCommandsData):
        return speech_commands_recordings(data.root, data.version, data.held_out, data.words)
    return find_recordings(data.root, data.pattern, data.held_out_takes, data.words)


def _check_voices(data: EspeakData) -> None:
    if data.target in data.voices:
        raise SpecError(
            f"data.voices: source and target are disjoint, and the target {data.target!r} is listed. "
            f"Take it out of the list."
        )
    if data.target_takes <= data.shots:
        raise SpecError(
            f"data.target_takes is more than data.shots, or nothing is left to test on; got {data.target_takes} "
            f"and {data.shots}. Raise data.target_takes."
        )


def _load_espeak(data: EspeakData, seed: int, *, source: bool) -> Domains:
    _check_voices(data)
    said = takes_of(data.target, data.words, data.target_takes)
    for voice in data.voices:
        said += takes_of(voice, data.words, data.takes + data.held_out)
    by_name = {f"{u.voice}/{u.word}/{u.take}": u for u in said}
    found = [
        Recording(name, u.word, u.voice, held_out=u.voice != data.target and u.take >= data.takes)
        for name, u in by_name.items()
    ]
    preprocessing = SpeechPreprocessing(features=data.features)

    def read(recordings: Sequence[Recording]) -> Tensor:
        return preprocessing.transform(speak([by_name[r.name] for r in recordings]))

    who = data.protocol(data.target, seed, data.voices, None, source=source)
    return domains(found, who, read, preprocessing, data.augment, data.source_augment)
