"""Messages for wrong fields of a spec: field, rule, value received, fix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from conservtl.errors import hint, wrong_tag
from conservtl.methods import Strategy
from conservtl.tasks.registry import unfinished_task

__all__ = ["explanations"]


_LINES = 20
_LONGEST, _RULE = 500, 4000  # characters of a name or a value; of a rule, which may list all kinds


def explanations(errors: Sequence[Any], adapter: TypeAdapter[Any]) -> list[str]:
    """Return a line for each of the first errors of Pydantic, and one for all the others.

    Args:
        errors: of a validation.
        adapter: the validator that found them; its schema holds the known fields.
    """
    definitions = _definitions(adapter, tuple(Strategy.named.values()))
    lines = [f"  {_explain(error, definitions)}" for error in errors[:_LINES]]
    return [*lines, f"  ... and {len(errors) - _LINES:,} more"] if len(errors) > _LINES else lines


@lru_cache(maxsize=2)
def _definitions(adapter: TypeAdapter[Any], _known: tuple[type[Strategy], ...]) -> dict[str, Any]:
    """Return the definitions of an adapter's schema, made anew when a strategy is registered."""
    definitions: dict[str, Any] = adapter.json_schema().get("$defs", {})
    return definitions


def _explain(error: Any, definitions: dict[str, Any]) -> str:
    """Return one line for an error."""
    place = [str(part) for part in error["loc"]]
    tags = _tags(definitions)
    shown = [_cut(part) for i, part in enumerate(place) if part not in tags or i == len(place) - 1]
    field = ".".join(shown) or "spec"
    if error["type"] == "extra_forbidden":
        return f"{field}: there is no such field.{hint(shown[-1], _fields_at(place[:-1], definitions))}"
    if error["type"] == "union_tag_not_found":
        return f"{field}: {error['ctx']['discriminator']} is missing. Name the kind, as in {{kind: folder}}."
    if error["type"] == "union_tag_invalid":
        if place:
            return f"{field}: {wrong_tag(error)}"
        fix = unfinished_task(str(error["ctx"]["tag"]), " A task of your own needs --import MODULE.")
        return f"{field}: {wrong_tag(error)}{fix}"
    message = _cut(error["msg"], _RULE).replace("valid tuple", "list")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"must hold fields of its own, such as {field}.{(_fields_at(place, definitions) or ['kind'])[0]}"
    received = error.get("input")
    short = "" if isinstance(received, (dict, list)) or error["type"] == "missing" else f"; received {_shown(received)}"
    return f"{field}: {message}{short}"


def _cut(text: str, longest: int = _LONGEST) -> str:
    """Return a text, without the end of a very long one."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except ValueError:  # Python prints no whole number of more than some thousand digits
        return "a number of too many digits"


def _fields_at(place: Sequence[str], definitions: dict[str, Any]) -> list[str]:
    """The fields of the section at a place: of the kind that it has, or of the type that its field refers to."""
    last = next((part for part in reversed(place) if not part.isdigit()), "")
    for definition in definitions.values():
        fields = definition.get("properties", {})
        tags = {fields.get(tag, {}).get("const") for tag in ("kind", "task")}
        if last in tags - {None}:
            return [name for name in fields if name != "kind"]
    for definition in definitions.values():
        reference = definition.get("properties", {}).get(last, {}).get("$ref", "").rpartition("/")[2]
        if reference:
            return list(definitions[reference].get("properties", {}))
    return []


def _tags(definitions: dict[str, Any]) -> set[str]:
    """Tags of unions, which Pydantic puts into the place of an error and a spec does not."""
    sections = [definition.get("properties", {}) for definition in definitions.values()]
    tags = (fields.get(tag, {}) for fields in sections for tag in ("kind", "task"))
    return {str(tag["const"]) for tag in tags if "const" in tag}
