"""The exception tree. Messages say: subject, rule, value received, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ConservtlError",
    "DataError",
    "InputError",
    "MissingExtraError",
    "PlanError",
    "SelectorError",
    "SourceError",
    "SpecError",
    "TrainingDivergedError",
    "hint",
    "wrong_tag",
]


class ConservtlError(Exception):
    """Everything conservtl raises on purpose."""


class InputError(ConservtlError, ValueError):
    """What was handed in is wrong and can be mended by whoever handed it in (exit code 2)."""


class SpecError(InputError):
    """A field of a spec, or an argument, is wrong."""


class SelectorError(SpecError):
    """A name or glob matches nothing, or two match the same parameter."""


class PlanError(InputError):
    """Strategies contradict each other, or the plan breaks one of its invariants."""


class SourceError(InputError):
    """The source weights cannot be read, do not fit or are not finite."""


class DataError(InputError):
    """Recordings, images or labels are missing or contradict the spec."""


class MissingExtraError(ConservtlError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class TrainingDivergedError(ConservtlError, RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


def hint(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words as a sentence, or all of them."""
    near = difflib.get_close_matches(word, known, 1)
    return f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(known)}." if known else ""


def wrong_tag(error: Mapping[str, Any], also: Sequence[str] = ()) -> str:
    """What is wrong with the kind of a part of a spec.

    Args:
        error: Pydantic's, of type ``union_tag_invalid``.
        also: further names that are known.
    """
    tag = str(error["ctx"]["tag"])
    known = [*(word.strip(" '") for word in str(error["ctx"]["expected_tags"]).split(",")), *also]
    return f"{tag!r} is none of {', '.join(known)}.{hint(tag, known)}"
