"""A source that a run saved: what the run added to its model or extended in it is part of the model adapted from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from conservtl.errors import SourceError, SpecError
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy, as_strategy
from conservtl.plan.decision import Extension, Extensions
from conservtl.plan.plan import Plan
from conservtl.source.read import Source, own_tensors

__all__ = [
    "check_extensions_agree",
    "describe_example",
    "inherited_strategies",
    "run_note",
    "saved_example",
    "saved_extensions",
    "saved_strategies",
]

_VALUES = 10**8  # of an example


def saved_strategies(run: Mapping[str, Any] | None) -> tuple[Strategy, ...]:
    """Return the strategies whose additions a run left in its model; none without a header.

    Raises:
        SourceError: one of a user's own is not imported; the message names its module.
        SpecError: one has fields that it cannot have.
    """
    extended = _extended(run)
    try:
        return tuple(as_strategy(fields) for fields in extended.get("strategies", ()))
    except SpecError as error:
        _check_imported(extended, error)
        raise


def saved_extensions(run: Mapping[str, Any] | None) -> tuple[Extension, ...]:
    """Return the extensions of the plan of the run that saved a model; arguments and errors as ``saved_strategies``."""
    extended = _extended(run)
    try:
        extensions: tuple[Extension, ...] = TypeAdapter(Extensions).validate_python(extended.get("extensions", ()))
    except ValidationError as error:
        _check_imported(extended, error)
        first = error.errors(include_url=False)[0]
        raise SourceError(
            f"the model's header must describe its extensions; {'.'.join(map(str, first['loc']))}: {first['msg']:.200}."
            " The file is damaged, or another program wrote it."
        ) from error
    return extensions


def inherited_strategies(source: Source, model: nn.Module) -> tuple[Strategy, ...]:
    """Return the strategies whose additions to a saved model the model does not have yet."""
    saved = saved_strategies(source.run)
    if not saved:
        return ()
    missing = bool(source.tensors.keys() - own_tensors(model).keys())
    return tuple(one for one in saved if not _has_additions(model, one, default=not missing))


def saved_example(run: Mapping[str, Any] | None) -> Any:
    """Return an example of the inputs of a saved model, of the right shapes; None: not known."""
    return _example(_extended(run).get("example"))


def describe_example(example: Any) -> Any:
    """Return an example as JSON: the shape of a tensor; the values of one of integers, such as lengths."""
    if isinstance(example, Mapping):
        return {name: describe_example(value) for name, value in example.items()}
    return list(example.shape) if example.is_floating_point() else {"values": example.tolist()}


def check_extensions_agree(plan: Plan, extensions: Collection[Extension], where: str) -> None:
    """Raise unless the plan's extensions have the settings of an earlier run's of their kind."""
    planned = {extension.name: extension for extension in plan.extensions}
    for saved in extensions:
        here = planned.get(saved.name, saved)
        if (then := _settings(saved)) != (now := _settings(here)):
            raise SourceError(
                f"{where} was saved with {saved.kind} of {_listed(then)}, and {here.by} has {_listed(now)}, with which "
                f"its weights would be another model's. Give {here.by} the settings of that run, or leave it out: the "
                "run's are then kept."
            )


def run_note(source: Source) -> tuple[str, ...]:
    """Return a remark on the run that saved the source: its labels and preprocessing, which no tensor tells."""
    if source.run is None:
        return ()
    labels = ", ".join(map(str, source.run["labels"][:12])) + (", ..." if len(source.run["labels"]) > 12 else "")
    made = "; ".join(f"{name} {value}" for name, value in source.run["preprocessing"].items() if name != "kind")
    parts = [f"the labels {labels}"] * bool(labels) + [f"the preprocessing {made}"] * bool(made)
    return (f"saved by a run with {' and '.join(parts)}",) if parts else ()


def _has_additions(model: nn.Module, strategy: Strategy, *, default: bool) -> bool:
    """Return whether a model has what a strategy adds: taking it away would change a module or its parameters.

    ``default`` is the answer for a strategy that cannot take away what it adds.
    """
    if type(strategy).retract is Strategy.retract:
        return default
    bare = deep_copy(unwrap(model))
    before = _structure(bare)
    strategy.retract(bare)
    return before != _structure(bare)


def _structure(model: nn.Module) -> tuple[list[str], list[type]]:
    return [name for name, _ in model.named_parameters()], [type(module) for module in model.modules()]


def _example(described: Any) -> Any:
    """Return an example of the described shape; None without one, or for one of more values than any example has."""
    try:
        if isinstance(described, Mapping):
            if set(described) == {"values"}:
                return torch.tensor(described["values"])
            return {name: _example(value) for name, value in described.items()}
        fits = described is None or math.prod(described) <= _VALUES
        return torch.zeros(described) if described is not None and fits else None
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"the model's header must describe an example of its inputs; received {error}.") from error


def _extended(run: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (run or {}).get("extended") or {}


def _check_imported(extended: Mapping[str, Any], error: Exception) -> None:
    """Raise an error that names the modules that must be imported first, if there are any."""
    if missing := [name for name in extended.get("modules", ()) if name not in sys.modules]:
        raise SourceError(
            f"the model was extended by code in {', '.join(missing)}, which is not imported. In Python, import it "
            f"before loading the model; on the command line: --import {' --import '.join(missing)}."
        ) from error


def _settings(extension: Extension) -> dict[str, Any]:
    return extension.model_dump(exclude={"kind", "by", "names"})


def _listed(settings: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in settings.items()}
    prior = f" (prior {1 / settings['share'] - 1:.6g})" if settings.get("share") else ""
    return ", ".join(f"{name} {value}" for name, value in shown.items()) + prior
