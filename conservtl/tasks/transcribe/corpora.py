"""Utterances in files, and loading of the two domains of any data section."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

from conservtl.data import Domains
from conservtl.errors import DataError, counted
from conservtl.tasks.audio import espeak
from conservtl.tasks.audio.reading import header_of, read_audio
from conservtl.tasks.audio.speakers import check_sources, check_target
from conservtl.tasks.bad_files import check_files, explained, refuse, shown_name
from conservtl.tasks.speech.folder import search
from conservtl.tasks.transcribe.lists import is_missing, text_of
from conservtl.tasks.transcribe.made_up import domains_of, load_grammar, load_strings
from conservtl.tasks.transcribe.manifests import Line, lines_of
from conservtl.tasks.transcribe.recordings import FileInputs
from conservtl.tasks.transcribe.sections import AnyData, CorpusData, GrammarData, StringsData
from conservtl.tasks.transcribe.shared_utterances import check_shared
from conservtl.tasks.transcribe.utterances import Utterance, split_utterances

__all__ = ["load", "speakers"]

_PATH = 200  # characters of a path in a message


def load(data: AnyData, *, seed: int, source: bool = True) -> Domains:
    """Read the utterances of a spec and split them into the two domains; recordings are decoded when needed.

    Without ``source`` the source's utterances are not read, and its parts are None.

    Raises:
        DataError: utterances are missing, unreadable, or contradict the spec.
        MissingExtraError: an optional dependency is missing.
    """
    if isinstance(data, GrammarData):
        return load_grammar(data, seed, source=source)
    if isinstance(data, StringsData):
        return load_strings(data, seed, source=source)
    utterances, bad, known = _utterances(data)
    if known:  # before bad lines are named, which may be of others
        check_target(data.target, known, bad)
        if source:  # before utterances are chosen by them
            named = {
                "data.source_speakers": data.source_speakers or (),
                "data.held_out_speakers": data.held_out_speakers,
            }
            check_sources(named, data.target, known)
    wanted = [one for one in utterances if one.speaker == data.target or (source and _is_source(one, data))]
    labels = data.tokens.vocabulary(one.text for one in wanted)
    bad |= _unencodable(wanted, data.tokens, labels)
    bad |= _unreadable(wanted)
    if data.on_bad == "error":
        refuse(bad)
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
            unlabelled=0 if data.unlabelled is None else data.unlabelled.utterances,
        )
        if source and not split.source_train:
            raise DataError(
                f"data.target must not be the only speaker, because a source model is trained on others; received "
                f"{data.target!r}. Add utterances of other speakers, or start from existing weights with source.data: "
                "null."
            )
    domains = domains_of(
        data, split, labels, lambda chosen: FileInputs(chosen, data.features), source=source, skipped=skipped
    )
    return replace(domains, notes=(*domains.notes, *_resampled(used, data.features.sample_rate)))


def speakers(data: AnyData) -> tuple[str, ...]:
    """Return the possible targets: every speaker, or the target voices of espeak-ng."""
    if isinstance(data, GrammarData):
        return espeak.TARGET_VOICES
    if isinstance(data, StringsData):
        found = search(data.root, data.pattern, data.held_out_takes, follow_links=data.follow_links)[0]
        return tuple(sorted({one.speaker for one in found}))
    return tuple(sorted({one.speaker for one in _utterances(data)[0]}))


def _resampled(utterances: Sequence[Utterance], rate: int) -> list[str]:
    """Say which recordings have another sample rate than the network."""
    others = Counter(one.rate for one in utterances if one.rate not in (None, rate))
    return [
        f"{counted(count, 'utterance', 'is', of=len(utterances))} resampled from {other:,} Hz to {rate:,} Hz"
        f"{f', with nothing above {other // 2:,} Hz' * (other < rate)}"
        for other, count in sorted(others.items())
        if other is not None
    ]


def _is_source(one: Utterance, data: CorpusData) -> bool:
    return data.source_speakers is None or one.speaker in {*data.source_speakers, *data.held_out_speakers}


def _unencodable(utterances: Sequence[Utterance], tokens: Any, labels: tuple[str, ...]) -> dict[Path, str]:
    bad = {}
    for one in utterances:
        try:
            tokens.encode(one.text, labels)
        except DataError as error:
            bad[Path(one.name)] = str(error).rpartition(". ")[0]
    return bad


def _unreadable(utterances: Sequence[Utterance]) -> dict[Path, str]:
    """Return the names of utterances whose samples cannot be used -> why."""
    bad: dict[Path, str] = {}
    for one in utterances:
        read = partial(read_audio, start=one.offset, seconds=one.seconds)
        found = check_files([one.file] if one.file else [], read, f"audio {one.offset} {one.seconds}")
        bad |= {Path(one.name): fault for fault in found.values()}
    return bad


def _utterances(data: CorpusData) -> tuple[list[Utterance], dict[Path, str], set[str]]:
    """Return the utterances that can be used, the names of the others -> why, and the speakers of all of them."""
    home = data.root.resolve()
    found: dict[str, Utterance] = {}
    first: dict[tuple[Path, float], str] = {}
    where: dict[str, str] = {}
    bad: dict[Path, str] = {}
    lines = lines_of(data.kind, data.root, data.files)
    if data.group is not None and not any(data.group.lower() in (line.fields or {}) for line in lines):
        known = dict.fromkeys(name for line in lines for name in line.fields or {})
        raise DataError(
            f"data.group must be a column of the lists; received {data.group!r}, and they have "
            f"{', '.join(known) or 'none'}. Correct it, or leave it out."
        )
    for line in lines:
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
        first[key] = where[one.name] = line.where
        found[one.name] = one
    check_shared(list(found.values()), where)
    return list(found.values()), bad, {_speaker(line, data) for line in lines} - {""}


def _speaker(line: Line, data: CorpusData) -> str:
    """Return the speaker of a line, or the value of ``data.group``; empty: it has none."""
    said = line.speaker if data.group is None else (line.fields or {}).get(data.group.lower())
    return "" if is_missing(said) else normalize("NFC", str(said))


def _utterance(line: Line, data: CorpusData, home: Path) -> Utterance:
    """Return the utterance of a line; an error says why it cannot be used, without its name."""
    if line.fault is not None:
        raise DataError(line.fault)
    if not line.path:
        raise DataError("has no recording")
    said = line.text
    if said is None and (apart := (line.fields or {}).get("text_filepath")):
        said = text_of(_below(str(apart), "text", line, data, home))
    text = data.text(said or "")
    if not (speaker := _speaker(line, data)):
        raise DataError(f"has no {data.group or 'speaker'}")
    if not text and (data.unlabelled is None or speaker != data.target):
        raise DataError("has no text")
    real = _below(line.path, "recording", line, data, home)
    offset, duration = _seconds(line.offset, "an offset"), _seconds(line.duration, "a duration")
    length, rate = header_of(real)
    offset = offset or 0.0
    duration = length - offset if duration is None else duration
    if duration <= 0:
        raise DataError(f"must be longer than 0 s; its duration is {duration:g}")
    if duration > data.longest:
        raise DataError(f"is longer than data.longest, {data.longest:g} s: its duration is {duration:g}")
    changes = [one.waves for one in (data.augment, data.source_augment) if one is not None and one.waves is not None]
    slowest = max([1.0, *(1 / min(one.speeds) for one in changes)])
    if duration * slowest > data.features.longest:
        how = ", at the slowest of data.augment.waves" * (slowest > 1)
        raise DataError(
            f"is longer than data.features.seconds, {data.features.longest:g} s: its duration is "
            f"{duration * slowest:g}{how}"
        )
    if offset + duration > length + 0.05:
        raise DataError(f"must lie within its recording of {length:.2f} s; it ends at {offset + duration:.2f}")
    file = line.base / line.path
    name = str(file.relative_to(data.root)) if file.is_relative_to(data.root) else str(file)
    name += f"@{offset:g}" if offset else ""
    return Utterance(name, text, speaker, duration, real, offset, line.part, rate)


def _below(path: str, what: str, line: Line, data: CorpusData, home: Path) -> Path:
    """Return the file that a line names, if it is there and below the folder of the data."""
    try:
        file = (line.base / path).resolve()
        found = file.is_file()
    except (OSError, ValueError):  # no name of a file: too long, or with a zero byte
        file, found = home, False
    if not data.follow_links and not file.is_relative_to(home):
        raise DataError(
            f"leads out of {shown_name(data.root)} ({shown_name(path)}; data.follow_links: true follows it)"
        )
    if not found:
        raise DataError(f"has no {what}: there is no file {shown_name(path)[:_PATH]}")
    return file


def _seconds(value: Any, field: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise DataError(f"has {field} that is no number of seconds, {value!r:.40}")
    return number
