"""Checks of a task's class at its definition, so that no run ends with a model that cannot be loaded."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from conservtl.errors import SpecError
from conservtl.spec_model import check_describable

__all__ = ["check_declaration"]

_ATTRIBUTES = {
    "summary": "one line for the JSON schema",
    "model_section": "the class of the spec's section model",
    "data_section": "the class of the spec's section data",
    "preprocessing": "the class of Domains.preprocessing, to read a saved model's back",
}


def check_declaration(task: type[Any]) -> None:
    """Raise unless a task with a name declares its attributes, and specs can hold its sections.

    Attributes are classes of Pydantic, each field of the model section has a default, and JSON can describe each field.
    """
    where = f"task {task.name!r}: {task.__qualname__}"
    if not isinstance(task.name, str) or not task.name:
        raise SpecError(f"{where}.name must be a text that specs can name; received {task.name!r}.")
    if missing := [name for name in _ATTRIBUTES if not hasattr(task, name)]:
        listed = "; ".join(f"{name}, {_ATTRIBUTES[name]}" for name in missing)
        raise SpecError(f"{where} must declare {listed}. Set them as class attributes.")
    sections = _members(task.data_section)
    for name, classes in {
        "model_section": [task.model_section],
        "data_section": sections,
        "preprocessing": [task.preprocessing],
    }.items():
        if wrong := [each for each in classes if not (isinstance(each, type) and issubclass(each, BaseModel))]:
            raise SpecError(f"{where}.{name} must be a subclass of pydantic.BaseModel; received {wrong[0]!r}.")
    for section in (task.model_section, *sections):
        check_describable(section)
    try:
        task.model_section()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SpecError(
            f"{where}: every field of {task.model_section.__qualname__} must have a default that it accepts, because "
            f"a spec may leave the section model out; {field}: {first['msg']}. Give it one."
        ) from error


def _members(annotation: Any) -> list[Any]:
    """Return the classes of a union, annotated or not; of a class, the class alone."""
    if hasattr(annotation, "__metadata__"):
        return _members(get_args(annotation)[0])
    return [one for each in get_args(annotation) for one in _members(each)] or [annotation]
