"""A source that a run saved: what was added to its model is added to the model that adapts from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from conservtl.errors import SourceError
from conservtl.methods import Strategy, as_strategy
from conservtl.plan.plan import Plan
from conservtl.source.read import Source

__all__ = ["check_saved_extensions", "inherited_strategies", "run_note"]

_NOT_SETTINGS = {"kind", "by", "names"}


def inherited_strategies(source: Source, own: Collection[str]) -> tuple[Strategy, ...]:
    """Return the strategies that added parameters to a saved model which the model does not have yet.

    Args:
        source: matched to the model's names.
        own: names of the model's tensors.
    """
    if not (source.tensors.keys() - set(own)):
        return ()
    return tuple(as_strategy(fields) for fields in _extended(source).get("strategies", ()))


def check_saved_extensions(plan: Plan, source: Source) -> None:
    """Raise unless the plan extends modules as the run did that saved the source, with the same settings.

    Raises:
        SourceError: the plan lacks an extension, or has other settings; the message gives both.
    """
    planned = {extension.kind: extension.model_dump(mode="json") for extension in plan.extensions}
    for fields in _extended(source).get("extensions", ()):
        kind, settings = fields["kind"], _settings(fields)
        found = "none" if kind not in planned else _listed(_settings(planned[kind]))
        if found != _listed(settings):
            prior = f" (prior {1 / settings['share'] - 1:.6g})" if settings.get("share") else ""
            raise SourceError(
                f"{source.where} was saved with {kind} of {_listed(settings)}{prior}; the plan has {found}, so its "
                f"weights would be another model's. Add {fields.get('by', 'its strategy')} with the same setting."
            )


def run_note(source: Source) -> tuple[str, ...]:
    """Return a remark on the run that saved the source: its labels and preprocessing, which no tensor tells."""
    if source.run is None:
        return ()
    labels = ", ".join(map(str, source.run["labels"][:12])) + (", ..." if len(source.run["labels"]) > 12 else "")
    made = "; ".join(f"{name} {value}" for name, value in source.run["preprocessing"].items() if name != "kind")
    return (f"saved by a run with the labels {labels} and the preprocessing {made}",)


def _extended(source: Source) -> Mapping[str, Any]:
    return ((source.run or {}).get("extended")) or {}


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NOT_SETTINGS}


def _listed(settings: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
