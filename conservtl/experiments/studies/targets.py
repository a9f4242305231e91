"""The targets that runs are repeated over: speakers, corruptions, ... as the task names them."""

from __future__ import annotations

from conservtl.experiments.spec.spec import Spec, with_fields

__all__ = ["on_target", "targets_of"]


def targets_of(spec: Spec) -> tuple[str, ...]:
    """Return every target that the spec's data has."""
    return spec.problem.targets(spec.data)


def on_target(spec: Spec, target: str) -> Spec:
    """Return the spec with another target."""
    fields = spec.problem.on_target(spec.data, target)
    return with_fields(spec, fields) if fields else spec
