"""Specs of utterances, and loading of the two domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from unicodedata import normalize

from annotated_types import MinLen
from pydantic import AfterValidator, Field

from conservtl.bounds import Count, Place, Positive, ProperShare
from conservtl.data import Domains
from conservtl.errors import DataError, SpecError
from conservtl.extras import require
from conservtl.tasks.audio import espeak
from conservtl.tasks.bad_files import FolderFiles, check_files, explained, refuse, shown_name
from conservtl.tasks.base import DataSection
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.grammar import sentences
from conservtl.tasks.transcribe.manifests import Line, lines_of
from conservtl.tasks.transcribe.recordings import FileInputs, SpokenInputs
from conservtl.tasks.transcribe.spec_augment import SpecAugment
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.tokens import Characters, Tokenizer
from conservtl.tasks.transcribe.utterances import Split, Utterance, sequences, split_utterances

__all__ = ["CorpusData", "DataSpec", "GrammarData", "load", "speakers"]

_SLOWER = 3  # quarters of the rate of single words: CTC needs a frame for each letter
ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"
"""The alphabet of English text in lower case."""

Text = Annotated[str, AfterValidator(lambda text: normalize("NFC", text))]
"""A speaker; composed and decomposed letters are the same."""


class _UtteranceData(DataSection):
    """Fields of all kinds of utterances."""

    shots: Count = 10
    """Utterances of the target speaker to adapt with."""
    validation: ProperShare = 0.0
    """Share of the shots for validation instead of training."""
    features: Features = Features()
    """Conversion of a recording to an input of the network."""
    text: Normalisation = Normalisation()
    """Rules for texts, applied before training and scoring."""
    tokens: Tokenizer = Characters()
    """How a text becomes tokens."""
    augment: SpecAugment | None = SpecAugment()
    """Augmentation of the shots during adaptation; null for none."""
    source_augment: SpecAugment | None = SpecAugment()
    """Augmentation of the source's utterances while a source model is trained; null for none."""

    def preprocessing(self, labels: Sequence[str]) -> TranscribePreprocessing:
        """Return the conversion of files, with the vocabulary in it."""
        tokens: Any = self.tokens
        if isinstance(tokens, Characters):
            tokens = Characters(alphabet="".join(" " if label == "|" else label for label in labels[1:]))
        else:
            tokens = tokens.embedded()
        return TranscribePreprocessing(features=self.features, text=self.text, tokens=tokens)


class GrammarData(_UtteranceData):
    """Sentences of a small grammar, spoken by espeak-ng: numbers, dates, times and commands. No files, no network."""

    kind: Literal["grammar"] = "grammar"
    """Synthetic voices."""
    target: Text = "de+f4"
    """The voice to which the model is adapted."""
    voices: Annotated[tuple[Text, ...], MinLen(1)] = espeak.SOURCE_VOICES
    """The voices of the source model."""
    sentences: Count = 40
    """Sentences of each source voice to train on."""
    held_out: Count = 5
    """Further sentences of each source voice to test on."""
    target_sentences: Count = 60
    """Sentences of the target voice; those that are no shots are tested on."""
    tokens: Tokenizer = Characters(alphabet=ENGLISH)
    """How a text becomes tokens."""
    features: Features = Features(sample_rate=11_025, hop=0.010)
    """Conversion of a recording to an input of the network. A rate of which espeak-ng's 22,050 Hz is a multiple is
    quick to make."""


class CorpusData(_UtteranceData, FolderFiles):
    """Utterances in files, in one of the usual layouts."""

    kind: Literal["manifest", "kaldi", "librispeech", "common_voice", "audiofolder"] = "manifest"
    """`manifest`: JSON lines as NeMo writes them (`audio_filepath`, `text`, `speaker`, `duration`, `offset`), CSV or
    TSV (`path`, `text`, `speaker`). `kaldi`: `wav.scp`, `text`, `utt2spk`. `librispeech`; `common_voice`: the folder
    of one language. `audiofolder`: `metadata.csv` beside the recordings, as in Hugging Face's datasets."""
    root: Place
    """The folder."""
    files: tuple[str, ...] = ()
    """Manifests below the folder; empty: all in it. Names with train, dev or test in them are those parts."""
    target: Text
    """The speaker to whom the model is adapted."""
    source_speakers: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """The speakers of the source model; null for all but the target."""
    held_out_speakers: tuple[Text, ...] = ()
    """Source speakers to test on only."""
    held_out: ProperShare = 0.1
    """Share of the source's utterances that forms its test part, where the data has no official one."""
    longest: Positive = 30.0
    """Longest utterance in seconds; longer ones are bad."""


DataSpec = Annotated[GrammarData | CorpusData, Field(discriminator="kind")]
"""Spec of utterances, selected by ``kind``."""


def load(data: GrammarData | CorpusData, *, seed: int, source: bool = True) -> Domains:
    """Read the utterances of a spec and split them into the two domains; recordings are decoded when needed.

    Args:
        data: the spec.
        seed: draws the shots and the validation part.
        source: whether to read the source's utterances; otherwise ``source_train`` and ``source_test`` are None.

    Raises:
        DataError: utterances are missing, unreadable, or contradict the spec.
        MissingExtraError: an optional dependency is missing.
    """
    if isinstance(data, GrammarData):
        return _load_grammar(data, seed, source=source)
    utterances, bad = _utterances(data)
    wanted = [one for one in utterances if one.speaker == data.target or (source and _is_source(one, data))]
    labels = data.tokens.vocabulary(one.text for one in wanted)
    bad |= _unencodable(wanted, data.tokens, labels)
    if data.on_bad == "error":
        refuse(bad)
    else:
        files = dict.fromkeys(one.file for one in wanted if one.file is not None)
        damaged = check_files(files, _readable, "transcribe")
        bad |= {Path(one.name): damaged[one.file] for one in wanted if one.file in damaged}
    used = [one for one in wanted if Path(one.name) not in bad]
    skipped = {str(name): reason for name, reason in sorted(bad.items())}
    with explained(skipped):
        split = split_utterances(
            used,
            data.target,
            shots=data.shots,
            validation=data.validation,
            seed=seed,
            source_speakers=data.source_speakers if source else None,
            held_out_speakers=data.held_out_speakers if source else (),
            held_out=data.held_out,
        )
        if source and not split.source_train:
            raise DataError(
                f"data.target must not be the only speaker, because a source model is trained on others; received "
                f"{data.target!r}. Add utterances of other speakers, or start from existing weights with source.data: "
                "null."
            )
    return _domains(
        data, split, labels, lambda chosen: FileInputs(chosen, data.features), source=source, skipped=skipped
    )


def speakers(data: GrammarData | CorpusData) -> tuple[str, ...]:
    """Return the possible targets: every speaker, or the target voices of espeak-ng.

    Raises:
        DataError: a list is missing.
    """
    if isinstance(data, GrammarData):
        return espeak.TARGET_VOICES
    return tuple(sorted({one.speaker for one in _utterances(data)[0]}))


def _domains(
    data: GrammarData | CorpusData,
    split: Split,
    labels: tuple[str, ...],
    inputs: Any,
    *,
    source: bool,
    skipped: Mapping[str, str] | None = None,
) -> Domains:
    def part(chosen: Sequence[Utterance]) -> Any:
        encoded = sequences(chosen, inputs, lambda text: data.tokens.encode(text, labels))
        return encoded if len(encoded) else None

    return Domains(
        labels=labels,
        source_labels=labels,
        shots=part(split.shots),
        validation=part(split.validation),
        target_test=part(split.target_test),
        source_train=part(split.source_train) if source else None,
        source_test=part(split.source_test) if source else None,
        preprocessing=data.preprocessing(labels),
        augmentation=data.augment,
        source_augmentation=data.source_augment,
        skipped=skipped or {},
    )


def _is_source(one: Utterance, data: CorpusData) -> bool:
    return data.source_speakers is None or one.speaker in {*data.source_speakers, *data.held_out_speakers}


def _readable(file: Path) -> object:
    from conservtl.tasks.audio.reading import read_audio

    return read_audio(file)


def _unencodable(utterances: Sequence[Utterance], tokens: Any, labels: tuple[str, ...]) -> dict[Path, str]:
    bad = {}
    for one in utterances:
        try:
            tokens.encode(one.text, labels)
        except DataError as error:
            bad[Path(one.name)] = str(error).rpartition(". ")[0]
    return bad


def _utterances(data: CorpusData) -> tuple[list[Utterance], dict[Path, str]]:
    """Return the utterances that can be used, and the names of the others -> why.

    Raises:
        DataError: a list is missing, or two lines are the same utterance.
    """
    home = data.root.resolve()
    found: dict[str, Utterance] = {}
    first: dict[tuple[Path, float], str] = {}
    bad: dict[Path, str] = {}
    for line in lines_of(data.kind, data.root, data.files):
        try:
            one = _utterance(line, data, home)
        except DataError as error:
            bad[Path(line.where)] = str(error).rstrip(".")
            continue
        key = (one.file or Path(), one.offset)
        if key in first:
            raise DataError(
                f"{line.where}: every utterance must be there once, or a model is tested on what it is trained on; "
                f"{shown_name(one.name)} is in {first[key]} too. Remove one of them."
            )
        first[key] = line.where
        found[one.name] = one
    return list(found.values()), bad


def _utterance(line: Line, data: CorpusData, home: Path) -> Utterance:
    """Return the utterance of a line.

    Raises:
        DataError: why it cannot be used, without its name.
    """
    if not line.path:
        raise DataError("has no recording")
    text = data.text(line.text or "")
    if not text:
        raise DataError("has no text")
    if not line.speaker:
        raise DataError("has no speaker")
    file = line.base / line.path
    real = file.resolve()
    if not data.follow_links and not real.is_relative_to(home):
        raise DataError(
            f"leads out of {shown_name(data.root)} ({shown_name(line.path)}; data.follow_links: true follows it)"
        )
    if not real.is_file():
        raise DataError(f"has no recording: there is no file {shown_name(line.path)}")
    offset, duration = _seconds(line.offset, "offset"), _seconds(line.duration, "duration")
    length = _length(real)
    offset = offset or 0.0
    duration = length - offset if duration is None else duration
    if duration <= 0:
        raise DataError(f"must be longer than 0 s; its duration is {duration:g}")
    if duration > data.longest:
        raise DataError(f"is longer than data.longest, {data.longest:g} s: its duration is {duration:g}")
    if offset + duration > length + 0.05:
        raise DataError(f"must lie within its recording of {length:.2f} s; it ends at {offset + duration:.2f}")
    name = str(file.relative_to(data.root)) if file.is_relative_to(data.root) else str(file)
    name += f"@{offset:g}" if offset else ""
    return Utterance(name, text, normalize("NFC", line.speaker), duration, real, offset, line.part)


def _seconds(value: Any, field: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise DataError(f"has a {field} that is no number of seconds, {value!r:.40}")
    return number


def _length(file: Path) -> float:
    """Return the duration of a recording in seconds, from its header."""
    soundfile = require("soundfile", "speech")
    try:
        info = soundfile.info(str(file))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError("cannot be read as audio") from error
    return float(info.frames / info.samplerate)


def _load_grammar(data: GrammarData, seed: int, *, source: bool) -> Domains:
    if data.target in data.voices:
        raise SpecError(
            f"data.voices must not contain data.target; received {data.target!r} in both. Remove it from data.voices."
        )
    spoken: dict[str, espeak.Utterance] = {}
    own = _spoken_by(data.target, data.target_sentences, data.text, spoken)
    train, test = [], []
    for voice in data.voices if source else ():
        said = _spoken_by(voice, data.sentences + data.held_out, data.text, spoken)
        train += said[: data.sentences]
        test += said[data.sentences :]
    split = split_utterances(own, data.target, shots=data.shots, validation=data.validation, seed=seed)
    split = Split(split.shots, split.validation, split.target_test, train, test)
    labels = data.tokens.vocabulary(one.text for one in (*own, *train, *test))
    return _domains(data, split, labels, lambda chosen: SpokenInputs(chosen, data.features, spoken), source=source)


def _spoken_by(voice: str, count: int, text: Normalisation, spoken: dict[str, espeak.Utterance]) -> list[Utterance]:
    """Return utterances of a voice; durations are estimates, because nothing is synthesised yet."""
    utterances = []
    for take, sentence in enumerate(sentences(voice, count)):
        (said,) = espeak.takes_of(voice, [sentence], 1)
        said = replace(said, rate=said.rate * _SLOWER // 4)
        name = f"{voice}/{take} {sentence}"
        spoken[name] = said
        utterances.append(Utterance(name, text(sentence), voice, 0.3 + 10.0 * len(sentence) / said.rate))
    return utterances
