"""The examples of a run or a study in words: shots, unlabelled ones, those that were skipped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from conservtl.data.shots import taken_text
from conservtl.errors import counted, plural
from conservtl.tasks.bad_files import skipped_text

__all__ = [
    "examples_notes",
    "shots_of",
    "shots_text",
    "skipped_notes",
    "target_text",
    "unlabelled_text",
]


def target_text(report: Mapping[str, Any]) -> str:
    """Return the name of the target and the number of examples adapted to."""
    target, shots = report.get("target") or "the target", report.get("shots")
    if shots is None:
        return str(target)
    example = str(report.get("example") or "example")
    taken = (report.get("taken") or {}).values()
    words = shots_text(shots, example, classes=bool(report.get("classes")), taken=taken)
    if bare := unlabelled_text(report.get("examples") or {}, example):
        words = f"{words} and {bare}" if shots else bare
    return f"{target} from {words}"


def unlabelled_text(sizes: Mapping[str, int], example: str = "example") -> str:
    """Return the unlabelled examples of a run in words; empty if there are none.

    Example:
        >>> unlabelled_text({"unlabelled": 40, "accepted": 31, "rejected": 9}, "utterance")
        '40 unlabelled utterances (31 pseudo-labels accepted, 9 rejected)'
    """
    if not (bare := sizes.get("unlabelled")):
        return ""
    heard, missed = sizes.get("accepted"), sizes.get("rejected")
    labels = "" if heard is None else f" ({counted(heard, 'pseudo-label')} accepted, {missed:,} rejected)"
    return f"{counted(bare, f'unlabelled {example}')}{labels}"


def examples_notes(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence with the number of examples of each part, if the report knows them."""
    sizes, example = report.get("examples") or {}, str(report.get("example") or "example")
    names = {
        "shots": "to adapt with",
        "validation": "to validate on",
        "target_test": "of the target to test on",
        "source_train": "of the source to train on",
        "source_test": "of the source to test on",
    }
    parts = [f"{sizes[name]:,} {words}" for name, words in names.items() if name in sizes]
    if bare := unlabelled_text(sizes, example):
        parts.insert(1, bare)
    return [f"{plural(example).capitalize()}: {', '.join(parts)}."] if parts else []


def skipped_notes(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the files that a run or a study skipped, if there are any."""
    skipped = report.get("skipped") or {}
    named = {str(entry["file"]): str(entry["reason"]) for entry in skipped.get("files") or ()}
    return [f"{skipped_text(named, int(skipped['count']))}."] if named else []


def shots_text(shots: Any, example: str = "shot", *, classes: bool = True, taken: Collection[int] = ()) -> str:
    """Return the shots of a spec in words, of each class if there are classes.

    The numbers of examples that classes had are said where ``shots`` is no number.

    Example:
        >>> shots_text(5), shots_text({"up_to": 5}, "recording", taken=[5, 3, 4])
        ('5 shots a class', 'up to 5 recordings a class (3 to 5)')
    """
    most = shots["up_to"] if isinstance(shots, Mapping) else shots
    words = counted(most, example) if isinstance(most, int) else f"{most} {plural(example)}"
    words += " a class" if classes else ""
    if isinstance(shots, int):
        return words
    words = f"up to {words}" if isinstance(shots, Mapping) else words
    return f"{words} ({taken_text(taken)})" if taken else words


def shots_of(study: Mapping[str, Any], *, classes: bool) -> str:
    """Return the shots of a study, or of one of its tables, in words, with the fewest and the most of a class."""
    taken = study.get("taken")
    return shots_text(study["shots"], classes=classes, taken=(taken["fewest"], taken["most"]) if taken else ())
