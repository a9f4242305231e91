"""What a domain's runs can be repeated over: speakers, corruptions."""

from __future__ import annotations

from typing import Any, get_args

from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec
from conservtl.experiments.studies.result_store import with_fields
from conservtl.tasks import speech, vision

__all__ = ["on_target", "targets_of"]


def targets_of(spec: SpeechSpec | VisionSpec) -> tuple[str, ...]:
    """Every speaker found, or every corruption where the spec has one; else the one target that there is."""
    if isinstance(spec, SpeechSpec):
        return speech.speakers(spec.data)
    if getattr(spec.data, "corruption", None) is not None:
        names = vision.Corruption.model_fields["name"].annotation
        return tuple(get_args(names))
    return ("the target",)


def on_target(spec: SpeechSpec | VisionSpec, target: str) -> Any:
    """The spec with another target."""
    if isinstance(spec, SpeechSpec):
        return with_fields(spec, {"data.target": target})
    if getattr(spec.data, "corruption", None) is not None:
        return with_fields(spec, {"data.corruption.name": target})
    return spec
