"""The exception tree. Messages say: subject, rule, value received, what to do."""

from __future__ import annotations

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
