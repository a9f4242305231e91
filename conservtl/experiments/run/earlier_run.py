"""Weights that an earlier run saved: its labels and preprocessing are adopted, or what contradicts them is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conservtl.errors import SourceError, listed
from conservtl.experiments.spec.spec import Spec
from conservtl.source.run_header import OWN, read_header

__all__ = ["check_preprocessing", "earlier_run", "model_as_saved"]

_ABSENT = "nothing"


def earlier_run(spec: Spec) -> dict[str, Any] | None:
    """Return the header of the run that saved ``source.weights``; None if no run did.

    Raises:
        SourceError: task, network or labels of the spec contradict it; the message gives both values.
    """
    weights = spec.source.weights
    if not isinstance(weights, Path) or (header := read_header(weights)) is None:
        return None
    if header["task"] == OWN:  # weights alone: no section of a spec is in it
        return None
    where = f"source.weights {spec.source.shown!r}"
    if header["task"] != spec.task:
        raise SourceError(
            f"{where} were saved by a run of task {header['task']!r}, and the spec has {spec.task!r}. Give weights of "
            "the spec's task."
        )
    differences = _differences(_section(spec, header["model"]), _section(spec, model_as_saved(spec, header)))
    if different := [one for one in differences if "drop" not in one[0]]:  # dropout changes no trained model
        raise SourceError(_message(where, "model", different))
    labels, said = tuple(header["labels"]), spec.source.labels
    if said is not None and said != labels:
        raise SourceError(
            f"{where} were saved by a run with the labels {listed(labels)}, and source.labels has {listed(said)}. "
            "Leave source.labels out."
        )
    return header


def model_as_saved(spec: Spec, header: Mapping[str, Any]) -> Any:
    """Return the spec's ``model`` section, with the run's arguments of the network where it gives none."""
    model, args = spec.model, header["model"].get("args")
    return model if getattr(model, "args", True) or not args else model.model_copy(update={"args": args})


def check_preprocessing(spec: Spec, header: Mapping[str, Any], preprocessing: Any) -> None:
    """Raise unless inputs are made as in the run that saved the source's weights.

    Fields that make no inputs may differ: ``of_outputs`` and ``of_labels`` of the preprocessing. Rows of the head are
    copied by label.
    """
    try:
        saved = spec.problem.preprocessing.model_validate(header["preprocessing"]).model_dump(mode="json")
    except ValidationError:
        saved = header["preprocessing"]
    free = {*getattr(preprocessing, "of_outputs", ()), *getattr(preprocessing, "of_labels", ())}
    before, here = (
        {name: value for name, value in each.items() if name not in free}
        for each in (saved, preprocessing.model_dump(mode="json"))
    )
    if different := list(_differences(before, here)):
        where = f"source.weights {spec.source.shown!r}"
        raise SourceError(_message(where, "data", different))


def _section(spec: Spec, model: Any) -> dict[str, Any]:
    """Return a model section as this version writes it, without what changes no weight."""
    try:
        section = spec.problem.model_section.model_validate(model)
    except ValidationError:
        return dict(model)
    return section.model_dump(mode="json", exclude={"head"})


def _differences(saved: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name of each value that differs, with both values."""
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*saved, *here]):
            yield from _differences(saved.get(key, _ABSENT), here.get(key, _ABSENT), f"{name}.{key}".lstrip("."))
    elif saved != here:
        yield name, saved, here


def _message(where: str, section: str, different: list[tuple[str, Any, Any]]) -> str:
    shown = "; ".join(f"{section}.{name} was {saved} in that run and is {here} here" for name, saved, here in different)
    return (
        f"{where} were saved by a run, with which the spec must agree: {shown}. Give that run's value, or train a "
        "source model with the other."
    )
