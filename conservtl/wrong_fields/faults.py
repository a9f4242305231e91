"""Pydantic's errors at their places in the fields as a person writes them, and a sentence for each place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conservtl.errors import did_you_mean, hint, wrong_tag
from conservtl.wrong_fields.schema import Node, Schema

__all__ = ["sentences"]

_LONGEST, _RULE, _CONTAINER = 500, 4000, 120  # characters of a name or a value; of a rule; of a list or fields
_WANTS_FIELDS = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
_PARSING = ("_parsing", "_from_float")  # ends of types of errors about numbers and booleans
_OF_NAMES = ("extra_forbidden", "frozen_instance")  # places that no schema may have
_OF_VALIDATORS = ("value_error", "assertion_error")


def sentences(errors: Iterable[Any], schema: Node, within: str = "", *, python: bool = False) -> list[str]:
    """Return a sentence for each wrong place; errors of all types of a union become one.

    Args:
        errors: of Pydantic.
        schema: JSON schema of the fields; empty: not known.
        within: dotted name of the fields in the sentences; empty: they are a spec's.
        python: whether values are written as in Python, ``None`` instead of ``null``.
    """
    known = Schema(schema, python=python)
    located = [_located(error, known) for error in errors]
    faults = _one_for_a_union([one for one in located if not _follows(one, located)])
    prefix = (within,) * bool(within)
    lines = []
    for fault in faults:
        name = ".".join(_cut(part) for part in (*prefix, *fault.place)) or "spec"
        lines.append(f"{name}: {_sentence(name, fault, known)}")
    return lines


@dataclass(frozen=True)
class _Fault:
    """An error and its place.

    Args:
        error: Pydantic's.
        place: names and positions as they are written, without tags and types of unions.
        node: the schema there; of the fields around it, if there is no such field.
        siblings: the union of kinds that the fields around it are of, if they are.
        unions: the plain unions on the way: the length of the place of each, and its schema.
    """

    error: Any
    place: tuple[str, ...] = ()
    node: Node = field(default_factory=dict)
    siblings: Node = field(default_factory=dict)
    unions: tuple[tuple[int, Node], ...] = ()

    @property
    def of_a_member(self) -> bool:
        """Whether the value is of one of the types of the first union, and wrong in itself."""
        kind = self.error["type"]
        return len(self.place) > self.unions[0][0] or kind in _OF_VALIDATORS or kind.startswith("union_tag")


def _located(error: Any, schema: Schema) -> _Fault:
    """Return an error at its place."""
    parts = list(error["loc"])
    fault = _Fault(error, node=schema.root)
    for number, part in enumerate(parts):
        node, place = schema.resolved(fault.node), (*fault.place, str(part))
        following = parts[number + 1 : number + 2]
        if part in (kinds := schema.kinds(node)):
            fault = replace(fault, node=kinds[part], siblings=node)
        elif schema.types(node) and not isinstance(part, int):  # the part names a type
            form = "array" if following and isinstance(following[0], int) else "object"
            unions = (*fault.unions, (len(fault.place), fault.node))
            fault = replace(fault, node=schema.member(node, form) if following else fault.node, unions=unions)
        elif (inner := _below(schema.member(node, "array") or node, part)) is not None:
            fault = replace(fault, place=place, node=inner, siblings={} if following else fault.siblings)
        elif not schema.root or (not following and error["type"] in _OF_NAMES):
            fault = replace(fault, place=place)
    return fault


def _below(node: Node, part: Any) -> Node | None:
    """Return the schema of a field or of a value in a list; None if there is none."""
    if isinstance(part, int):
        listed = node.get("prefixItems", ())
        inner = listed[part] if part < len(listed) else node.get("items")
    else:
        inner = node.get("properties", {}).get(part)
        if inner is None and part != "[key]":  # that is Pydantic's, behind a name that is wrong itself
            inner = node.get("additionalProperties") or None
    return {} if inner is True else inner


def _follows(fault: _Fault, others: Sequence[_Fault]) -> bool:
    """Return whether a list is too short only because values in it are wrong."""
    place = fault.place
    return fault.error["type"] == "too_short" and any(
        len(one.place) > len(place) and one.place[: len(place)] == place for one in others
    )


def _one_for_a_union(faults: Sequence[_Fault]) -> list[_Fault]:
    """Return the faults with one for all types of a union, unless the value is of one of them."""
    groups: dict[Any, list[_Fault]] = {}
    for number, fault in enumerate(faults):
        place: Any = fault.place[: fault.unions[0][0]] if fault.unions else number
        groups.setdefault(place, []).append(fault)
    found = []
    for group in groups.values():
        first = group[0]
        if not first.unions:
            found.append(first)
        elif inner := [replace(one, unions=one.unions[1:]) for one in group if one.of_a_member]:
            found += _one_for_a_union(inner)
        else:
            found.append(replace(first, error={**first.error, "type": "union"}, node=first.unions[0][1], unions=()))
    return found


def _sentence(name: str, fault: _Fault, schema: Schema) -> str:
    """Return rule, value received and fix for a fault of the field of this name."""
    error, node = fault.error, fault.node
    kind, received = error["type"], error.get("input")
    if kind == "extra_forbidden" or (kind == "frozen_instance" and node and node is schema.root):
        return f"there is no such field.{_elsewhere(fault, schema)}"
    if kind == "frozen_instance":
        change = schema.pair(fault.place[-1], received)
        return f"cannot change once it is made; received {_shown(received)}. Make a copy: model_copy(update={change})."
    if kind == "missing":
        return f"Field required. Give {schema.words(node)}." if node else "Field required"
    if kind == "union_tag_invalid":
        return wrong_tag(error)
    if kind == "union_tag_not_found":
        given = set(received) if isinstance(received, Mapping) else set()
        kinds = schema.kinds(node)
        fitting = [one for one, fields in kinds.items() if given <= fields.get("properties", {}).keys()]
        example = schema.pair(error["ctx"]["discriminator"].strip("'"), [*fitting, *kinds, "..."][0])
        tag = error["ctx"]["discriminator"]
        return f"{tag} is missing. Name the kind, one of {', '.join(kinds)}, as in {example}."
    message = _cut(error["msg"], _RULE).partition(", ")[2] if kind in _OF_VALIDATORS else _cut(error["msg"], _RULE)
    if kind == "string_pattern_mismatch" and (examples := schema.resolved(node).get("examples")):
        message = f"must have the form {examples[0]}"
    elif kind == "union":
        message = f"must be {schema.words(node)}"
    elif kind == "path_type":
        message = "must be a path"
    elif kind.endswith(_PARSING):
        message = message.partition(", ")[0]
    elif kind in _WANTS_FIELDS:
        kinds = schema.kinds(node)
        fields = sorted(schema.fields(node), key=lambda one: one != "name")
        names = [schema.pair("kind", one) for one in kinds] or [f"{name}.{one}" for one in fields]
        rule = f"must hold fields of its own, such as {names[0]}" if names else f"must be {schema.words(node)}"
        message = rule + schema.or_nothing(node) * bool(names)
    message = message.replace("valid tuple", "list").replace("Tuple should", "List should")
    if (
        "received" in message
        or message.endswith((".", "?"))
        or (kind in _OF_VALIDATORS and isinstance(received, (dict, list)))
    ):
        return message
    fix = _fix(received, node, schema)
    if not fix and node and kind.endswith((*_PARSING, "_type")) and not kind.endswith(_WANTS_FIELDS):
        fix = f". Give {schema.words(node)}."
    return f"{message}; received {schema.null if received is None else _shown(received)}{fix}"


def _elsewhere(fault: _Fault, schema: Schema) -> str:
    """Return which kind has a field that this one lacks, or the field that is meant."""
    name = fault.place[-1]
    kinds = [kind for kind, fields in schema.kinds(fault.siblings).items() if name in fields.get("properties", {})]
    return f" It belongs to {schema.pair('kind', kinds[0])}." if kinds else hint(name, schema.fields(fault.node))


def _fix(received: Any, node: Node, schema: Schema) -> str:
    """Return how to write a value of a wrong type, as far as it says what is meant; empty otherwise."""
    inner, kinds = schema.resolved(node), schema.kinds(node)
    if received is True and inner.get("type") == "object" and not inner.get("required"):
        return ". Write {} for the defaults."
    if isinstance(received, Mapping) and received.keys() & {"range", "choices"}:
        return ". A range is searched by `conservtl tune` alone; give one value."
    listed = schema.resolved(schema.member(node, "array") or node)
    each = schema.kinds(listed.get("items", {}))
    if not isinstance(received, str):
        return ""
    if kinds and received in kinds:
        return f". Write {schema.pair('kind', received)}."
    if each:
        return f". Write [{schema.pair('kind', received if received in each else '...')}]."
    if holding := [name for name, one in inner.get("properties", {}).items() if received in schema.names(one)]:
        return f". Write {schema.pair(holding[0], received)}."
    if schema.words(inner.get("properties", {}).get("name", {})) == "text":
        return f". Write {schema.pair('name', received)}."
    if nearest := did_you_mean(received, schema.names(node)):
        return f".{nearest}"
    return f". Write {schema.listed(received)}." if schema.words(listed.get("items", {})) == "text" else ""


def _cut(text: str, longest: int = _LONGEST) -> str:
    """Return a text, without the end of a very long one."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value), _CONTAINER if isinstance(value, (dict, list, tuple)) else _LONGEST)
    except ValueError:  # Python prints no whole number of more than some thousand digits
        return "a number of too many digits"
