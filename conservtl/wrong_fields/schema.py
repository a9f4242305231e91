"""A JSON schema of fields: what is possible at a place, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SWITCHES", "Node", "Schema"]

Node = Mapping[str, Any]
SWITCHES = ("kind", "task")
"""Fields that tell the members of a union apart."""

_HIGH = ("maximum", "exclusiveMaximum")
_LARGEST = 2**31  # bounds from here on are those of a type, which no message needs


class Schema:
    """A JSON schema whose references are followed.

    Args:
        root: the schema of all fields; empty: not known.
        python: whether values are written as in Python, ``None`` instead of ``null``.
    """

    def __init__(self, root: Node, *, python: bool = False) -> None:
        self.root, self._python = root, python
        self.null = "None" if python else "null"

    def resolved(self, node: Node) -> Node:
        """Return a node without references, and without null where it stands beside a single type."""
        while True:
            if "$ref" in node:
                node = self.root["$defs"][node["$ref"].rpartition("/")[2]]
            elif len(node.get("allOf", ())) == 1:
                (node,) = node["allOf"]
            elif len(only := self.types(node)) == 1:
                (node,) = only
            else:
                return node

    @staticmethod
    def types(node: Node) -> list[Node]:
        """Return the types of a plain union, without null; empty: it is none."""
        return [one for one in node.get("anyOf", ()) if one.get("type") != "null"]

    def kinds(self, node: Node) -> dict[str, Node]:
        """Return kind -> fields, of a union that one field tells apart; empty: it is none."""
        node = self.resolved(node)
        mapping = node.get("discriminator", {}).get("mapping", {})
        order = {one["$ref"]: place for place, one in enumerate(node.get("oneOf", ())) if "$ref" in one}
        kinds = sorted(mapping.items(), key=lambda item: order.get(item[1], 0))
        return {kind: self.resolved({"$ref": reference}) for kind, reference in kinds}

    def fields(self, node: Node) -> list[str]:
        """Return the names of the fields at a node, those that it needs first."""
        node = self.resolved(node)
        needed = node.get("required", ())
        names = (name for name in node.get("properties", {}) if name not in SWITCHES)
        return sorted(names, key=lambda name: name not in needed)

    def member(self, node: Node, form: str) -> Node:
        """Return the first type of a plain union that holds fields (``object``) or a list (``array``)."""
        found = (one for one in self.types(self.resolved(node)) if self._form(one) == form)
        return next(found, {})

    def _form(self, node: Node) -> Any:
        return "object" if self.kinds(node) else self.resolved(node).get("type")

    def words(self, node: Node) -> str:
        """Return the values that a node takes, in words: "a whole number of at least 1, 'all' or null"."""
        *parts, last = dict.fromkeys(self._choices(node))
        return f"{', '.join(parts)} or {last}" if parts else last

    def _choices(self, node: Node) -> list[str]:
        """Return each value, or kind of values, that a node takes."""
        if len(node.get("anyOf", ())) > 1:
            ordered = sorted(node["anyOf"], key=lambda one: one.get("type") == "null")
            return [choice for one in ordered for choice in self._choices(one)]
        node = self.resolved(node)
        if kinds := self.kinds(node):
            return [f"fields of a kind, {{{node['discriminator']['propertyName']}: {' | '.join(kinds)}}}"]
        if "const" in node or "enum" in node:
            return [repr(value) for value in node.get("enum", [node.get("const")])]
        form = node.get("type", "")
        if form == "boolean":
            return ["True", "False"] if self._python else ["true", "false"]
        return [self.null if form == "null" else self._form_words(node)]

    def _form_words(self, node: Node) -> str:
        """Return the values of a type in words."""
        form = node.get("type", "")
        if form == "object":
            names = self.fields(node)
            values = node.get("additionalProperties")
            each = f", each {self.words(values)}" if isinstance(values, dict) else ""
            return f"fields, such as {{{names[0]}: ...}}" if names else f"{{name: value}}{each}"
        if form == "array":
            parts = node.get("prefixItems", ())
            each = parts[0] if parts else node.get("items", {})
            size = f" of {len(parts)}" if parts else " of at least one" if node.get("minItems") else ""
            return f"a list{size}{f' (each {self.words(each)})' if each else ''}"
        if form in ("integer", "number"):
            return f"a {'whole ' * (form == 'integer')}number{_bounds(node)}"
        if form == "string":
            return "a path" if node.get("format") == "path" else "text"
        return "another value"

    def pair(self, name: str, value: Any) -> str:
        """Return a field with a value, as it is written."""
        return repr({name: value}) if self._python else f"{{{name}: {value}}}"

    def listed(self, value: Any) -> str:
        """Return a list of one value, as it is written."""
        return repr([value]) if self._python else f"[{value}]"

    def or_nothing(self, node: Node) -> str:
        """Return ", or be null" if a node takes that."""
        nothing = any(one.get("type") == "null" for one in node.get("anyOf", ()))
        return f", or be {self.null}" if nothing else ""

    def names(self, node: Node) -> list[str]:
        """Return the texts among the values that a node takes: those of literals, the kinds of a union."""
        node = self.resolved(node)
        if types := self.types(node):
            return [name for one in types for name in self.names(one)]
        values = node.get("enum", [node["const"]] if "const" in node else [])
        return [*(value for value in values if isinstance(value, str)), *self.kinds(node)]


def _bounds(node: Node) -> str:
    node = {name: value for name, value in node.items() if not (name in _HIGH and value >= _LARGEST)}
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    limits = {
        "of at least": low,
        "above": node.get("exclusiveMinimum"),
        "of at most": high,
        "below": node.get("exclusiveMaximum"),
    }
    texts = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
    return f" {' and '.join(texts)}".replace("and of", "and") if texts else ""
