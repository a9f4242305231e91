"""Details of transcripts for a report: errors by kind and speaker, words that changed most, the worst utterances."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from conservtl.errors import DataError, MissingExtraError
from conservtl.extras import require
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.transcribe.word_errors import Errors, changed_words, character_errors, word_errors

__all__ = ["Transcript", "error_tables", "interval", "worst_utterances"]

_WORST = 10  # utterances
_WORDS = 12  # changed words
_BYTES = 200_000  # of an embedded recording; longer ones are named only
_RATE = 16_000  # Hz, of an embedded recording
_MIME = {"MP3": "audio/mpeg", "WAV": "audio/wav"}
_RESAMPLED = 2000  # draws of the bootstrap
_MISSING = "–"
_SIDES = ("before", "after")
_COUNTS = (word_errors, character_errors)
_RATES = ("error rate, %", "interval, %", "of characters, %", "interval, %")


@dataclass(frozen=True)
class Transcript:
    """An utterance as it was said and heard.

    Args:
        name: of the utterance.
        speaker: its speaker.
        said: the reference.
        before: what the source model heard.
        after: what the adapted model hears.
    """

    name: str
    speaker: str
    said: str
    before: str
    after: str


def error_tables(transcripts: Mapping[str, Sequence[Transcript]]) -> list[dict[str, Any]]:
    """Return tables of errors by kind, by speaker, and of the words that changed most, for "target" and "source"."""
    kinds, people, words = [], [], []
    for domain, each in transcripts.items():
        of_words, of_letters = ({when: _by_speaker(each, when, count) for when in _SIDES} for count in _COUNTS)
        for when, speakers in of_words.items():
            errors, letters = _pooled(speakers), _pooled(of_letters[when])
            counts = (errors.count, errors.substitutions, errors.deletions, errors.insertions)
            rates = (_share(errors), _spread(speakers), _share(letters), _spread(of_letters[when]))
            kinds.append([f"{domain}, {when}", *map(_whole, counts), *rates])
        people += [
            [f"{domain}: {name}", _whole(errors.count)]
            + [_share(side[when][name]) for side in (of_words, of_letters) for when in _SIDES]
            for name, errors in of_words["before"].items()
        ]
        words += _word_rows(domain, each)
    spread_note = "The interval is of 95 %, by a bootstrap over speakers, where there are two or more."
    return [
        {
            "title": "Word errors by kind",
            "note": spread_note,
            "header": ["", "words", "substituted", "deleted", "inserted", *_RATES],
            "rows": kinds,
            "text_columns": [0],
        },
        {
            "title": "Error rates of each speaker",
            "note": "",
            "header": ["", "words", *(f"{what} {when}, %" for what in ("words", "characters") for when in _SIDES)],
            "rows": people,
            "text_columns": [0],
        },
        {
            "title": "Words whose errors changed most",
            "note": "How often a word became another, before and after; – stands for no word.",
            "header": ["", "said", "heard", "before", "after"],
            "rows": words,
            "text_columns": [0, 1, 2],
        },
    ]


def worst_utterances(transcripts: Sequence[Transcript], data: Any) -> list[dict[str, Any]]:
    """Return the utterances with the most word errors after adaptation, with a recording each if it is short."""
    ranked = sorted(transcripts, key=lambda one: -word_errors([one.said], [one.after]).wrong)[:_WORST]
    places = {name: place for place, name in enumerate(data.names)}
    return [
        {
            "name": one.name,
            "lines": [["said", one.said], ["before", one.before], ["after", one.after]],
            "audio": _embedded(data.inputs, places[one.name]),
        }
        for one in ranked
        if word_errors([one.said], [one.after]).wrong
    ]


def interval(groups: Any) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a pooled error rate, by a bootstrap over groups; None with fewer than two."""
    wrong, count = zip(*((one.wrong, one.count) for one in groups), strict=True) if groups else ((), ())
    if len(wrong) < 2:
        return None, None
    drawn = torch.randint(len(wrong), (_RESAMPLED, len(wrong)), generator=torch.Generator().manual_seed(0))
    rates = torch.tensor(wrong)[drawn].sum(1) / torch.tensor(count)[drawn].sum(1).clamp_min(1)
    low, high = rates.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _by_speaker(
    transcripts: Sequence[Transcript], when: str, count: Callable[[list[str], list[str]], Errors]
) -> dict[str, Errors]:
    speakers: dict[str, list[Transcript]] = {}
    for one in sorted(transcripts, key=lambda one: one.speaker):
        speakers.setdefault(one.speaker, []).append(one)
    return {
        name: count([one.said for one in each], [getattr(one, when) for one in each]) for name, each in speakers.items()
    }


def _pooled(speakers: Mapping[str, Errors]) -> Errors:
    return Errors(*(sum(getattr(one, field.name) for one in speakers.values()) for field in fields(Errors)))


def _spread(speakers: Mapping[str, Errors]) -> str:
    low, high = interval(speakers.values())
    return _MISSING if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _word_rows(domain: str, transcripts: Sequence[Transcript]) -> list[list[str]]:
    said = [one.said for one in transcripts]
    before, after = (changed_words(said, [getattr(one, when) for one in transcripts]) for when in ("before", "after"))
    changed: Counter[tuple[str, str]] = Counter()
    for pair in {*before, *after}:
        changed[pair] = abs(after[pair] - before[pair])
    ranked = sorted(changed, key=lambda pair: (-changed[pair], pair))[:_WORDS]
    return [
        [domain, *(word or _MISSING for word in pair), _whole(before[pair]), _whole(after[pair])] for pair in ranked
    ]


def _embedded(inputs: Any, place: int) -> str:
    """Return a recording as a data URI; empty where there is none, or it is too long to embed."""
    try:
        wave, rate = inputs.wave(place)
        soundfile, content = require("soundfile", "speech"), io.BytesIO()
        kind = "MP3" if "MP3" in soundfile.available_formats() else "WAV"
        wave = resample(wave.unsqueeze(0), rate, _RATE)[0]
        soundfile.write(content, (wave / wave.abs().max().clamp_min(1e-9) * 0.9).numpy(), _RATE, format=kind)
    except (AttributeError, DataError, MissingExtraError):
        return ""
    data = content.getvalue()
    return "" if len(data) > _BYTES else f"data:{_MIME[kind]};base64," + base64.b64encode(data).decode()


def _share(errors: Errors) -> str:
    return f"{100 * errors.rate:.1f}" if errors.count else _MISSING


def _whole(number: int) -> str:
    return f"{number:,}"
