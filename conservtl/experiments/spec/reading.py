"""YAML and JSON as specs read them: a scalar keeps the text that it is written as.

A scalar is a number, a boolean or null if YAML 1.1 and YAML 1.2 agree on it: ``yes``, ``off``, numbers with a leading
zero, dates and times are text. Where a field wants text, a number is taken as it is written; where it wants a number or
a boolean, text that says one is taken (``0017``, ``yes``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError
from yaml.events import AliasEvent, Event
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

from conservtl.errors import SpecError
from conservtl.spec_scalars import Decimal, SwitchWord, Whole, written

__all__ = ["as_written", "changeable", "fault", "read_fields", "read_yaml"]

_PREFIX = "tag:yaml.org,2002:"
_SWITCH = "!switch"
_WANTS_TEXT = ("string_type", "path_type")


MAX_CHARACTERS = 256 * 1024
"""Length of a document."""
MAX_DEPTH = 64
"""Fields and lists within each other."""
MAX_NODES = 20_000
"""Fields and values of a document, those that aliases repeat counted each time."""


class _Loader(yaml.SafeLoader):
    """A safe loader whose scalars know their text and whose keys are text.

    Documents are data of bounded size: tags other than ``!!str`` are refused, and aliases that multiply.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - not those of YAML 1.1

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # identity of a finished node -> nodes in it

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        """Compose a node, and count it."""
        event: Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", f"{_PREFIX}str"):
            raise ComposerError(None, None, f"found the tag {tag!r}; a spec has no tags. Write the value alone", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"found more than {MAX_DEPTH} fields or lists within each other", mark)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, AliasEvent) and id(node) not in self._sizes:
            raise ComposerError(None, None, f"found the alias *{event.anchor} within what it stands for", mark)
        inner = node.value if isinstance(node, CollectionNode) else ()
        pairs = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        size = 1 + sum(self._sizes[id(part)] for part in pairs)
        if size > MAX_NODES:
            raise ComposerError(None, None, f"found more than {MAX_NODES:,} fields and values", mark)
        self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, Any]:  # type: ignore[override]
        own = [self._name(key, node) for key, _ in node.value]
        for position, name in enumerate(own):
            if name in own[:position] and name != "<<":
                raise ConstructorError(
                    "while reading fields", node.start_mark, f"found {name!r} twice", node.value[position][0].start_mark
                )
        self.flatten_mapping(node)
        return {self._name(key, node): self.construct_object(value, deep=deep) for key, value in node.value}

    @staticmethod
    def _name(key: Any, node: MappingNode) -> str:
        if not isinstance(key, ScalarNode):
            raise ConstructorError(
                "while reading fields", node.start_mark, "found a name that is no text", key.start_mark
            )
        return str(key.value)

    def construct_number(self, node: ScalarNode) -> Any:
        """Return a number that keeps its text if Python would print it differently."""
        read: Any = self.construct_yaml_float if node.tag.endswith("float") else self.construct_yaml_int
        try:
            number = read(node)
            if repr(number) == node.value:
                return number
        except (ValueError, OverflowError) as error:
            raise ConstructorError(
                None, None, f"found a number that cannot be read: {error}", node.start_mark
            ) from error
        kept = (Decimal if isinstance(number, float) else Whole)(number)
        kept.text = str(node.value)
        return kept

    def construct_switch(self, node: ScalarNode) -> SwitchWord:
        """Return a word that YAML 1.1 reads as a boolean."""
        return SwitchWord(node.value)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list(first))


_resolve(f"{_PREFIX}null", r"~|null|Null|NULL", "~nN")
_resolve(f"{_PREFIX}bool", r"true|false", "tf")
_Loader.add_implicit_resolver(f"{_PREFIX}null", re.compile(r"\Z"), [""])
_resolve(_SWITCH, r"True|TRUE|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "TFyYnNoO")
_resolve(f"{_PREFIX}int", r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)", "-+0123456789")
_resolve(
    f"{_PREFIX}float",
    r"[-+]?(?:(?:0|[1-9][0-9_]*)?\.[0-9_]+|(?:0|[1-9][0-9_]*)\.)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_resolve(f"{_PREFIX}merge", "<<", "<")
_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_number)
_Loader.add_constructor(f"{_PREFIX}float", _Loader.construct_number)
_Loader.add_constructor(_SWITCH, _Loader.construct_switch)


def read_yaml(text: str) -> Any:
    """Return the content of a YAML or JSON document.

    Raises:
        yaml.YAMLError: the text is not valid, too long, too deep or has too many values; a name stands twice in the
            same fields; there is a tag.

    >>> read_yaml("words: [yes, no, 0017, 2024-01-01, 12:30, 1e5]")
    {'words': ['yes', 'no', '0017', '2024-01-01', '12:30', '1e5']}
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it must have at most {MAX_CHARACTERS:,} characters; it has {len(text):,}.")
    return yaml.load(text, _Loader)  # noqa: S506 - a subclass of the safe loader # nosec B506


def fault(error: yaml.YAMLError) -> str:
    """Return a sentence with the place for an error of ``read_yaml``."""
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    said = " ".join(part for part in (error.context, error.problem) if part)
    return f"{place}{said.rstrip('.')}."


def read_fields(text: str, where: str) -> dict[str, Any]:
    """Return fields that are written on one line, as in ``{kind: beam, beam: 20}``.

    Raises:
        SpecError: the text holds none.
    """
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{where} is not valid YAML: {fault(error)}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{where} must hold fields, such as '{{kind: greedy}}'; received {text[:80]!r}.")
    return content


def as_written(content: dict[str, Any], errors: Sequence[ErrorDetails]) -> bool:
    """Put the text of numbers, booleans and null into fields, in place, where a validator wanted text.

    Returns:
        Whether anything changed, so that another validation may find less.
    """
    changed = False
    for error in errors:
        if error["type"] not in _WANTS_TEXT or (text := written(error["input"])) is None:
            continue
        section: Any = content
        value: Any = content
        key: Any = None
        place: tuple[Any, ...] = error["loc"]
        for part in place:  # also the tags of unions, which the content does not have
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
                section, key, value = value, part, value[part]
        if value is error["input"] and (value is not None or isinstance(section, list)):
            section[key] = text
            changed = True
    return changed


def changeable(content: Any) -> Any:
    """Return a copy of fields in dictionaries and lists of its own."""
    if isinstance(content, Mapping):
        return {key: changeable(value) for key, value in content.items()}
    return [changeable(value) for value in content] if isinstance(content, (list, tuple)) else content
