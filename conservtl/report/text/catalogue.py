"""All strategies with paper, cost, measured gain and when they hurt, from their own docstrings and fields."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from conservtl.errors import SpecError, hint
from conservtl.methods import Strategy, builtin_strategies

__all__ = ["Entry", "catalogue", "full_text", "short_text"]

_SECTION = re.compile(r"^(Cost|Hurts|Measured|Raises|Reference|Example):[ ]*", re.MULTILINE)
_UNKNOWN = "not said"


@dataclass(frozen=True)
class Entry:
    """A strategy as its code describes it.

    Args:
        kind: its name in a spec.
        short: further names, as specs may use them.
        name: of the class.
        effect: first line of the docstring.
        told: the docstring before its sections.
        paper: reference.
        cost: memory and time.
        hurts: when it does harm.
        gains: setting -> measured gain, for each variant that was measured.
        fields: (name, default, description).
    """

    kind: str
    short: tuple[str, ...]
    name: str
    effect: str
    told: str
    paper: str
    cost: str
    hurts: str
    gains: dict[str, dict[str, str]]
    fields: tuple[tuple[str, str, str], ...]


def catalogue(glob: str = "*") -> list[Entry]:
    """Return the strategies whose kind, short name or class a glob matches, sorted by kind.

    Imported strategies of a user's own are among them.
    """
    known = dict.fromkeys((*builtin_strategies().values(), *Strategy.named.values()))
    entries = sorted(map(_entry, known), key=lambda entry: entry.kind)
    names = {entry.kind: (entry.kind, entry.name, *entry.short) for entry in entries}
    found = [entry for entry in entries if any(fnmatchcase(name, glob) for name in names[entry.kind])]
    if not found:
        known_names = [name for each in names.values() for name in each]
        raise SpecError(f"{glob!r} must match the name of a strategy; it matches none.{hint(glob, known_names)}")
    return found


def short_text(entries: list[Entry]) -> str:
    """Return a few lines for each strategy."""
    return "\n\n".join(
        "\n".join(
            [
                f"{entry.kind}  ({', '.join((entry.name, *entry.short))})",
                f"  {entry.effect}",
                f"  paper  {entry.paper}",
                f"  cost   {entry.cost}",
                f"  gain   {_gain(entry)}",
                f"  hurts  {entry.hurts}",
            ]
        )
        for entry in entries
    )


def full_text(entry: Entry) -> str:
    """Return everything about one strategy, with its fields and defaults."""
    shipped = _shipped()
    gains = [f"{variant}: {_settings(values)}" for variant, values in entry.gains.items()] or [_gain(entry)]
    measured = [f"({shipped['what']}, points; {shipped['benchmark']}, {shipped['date']})"] * bool(entry.gains)
    parts = {
        "Paper": entry.paper,
        "Cost": entry.cost,
        "When it hurts": entry.hurts,
        "Measured gain": "\n  ".join([*gains, *measured]),
        "Fields": "\n  ".join(f"{name} = {default}\n    {text}" for name, default, text in entry.fields) or "none",
    }
    head = f"{entry.kind}  ({', '.join((entry.name, *entry.short))})\n\n{entry.told}"
    return "\n\n".join([head, *(f"{title}\n  {text}" for title, text in parts.items())])


def _entry(cls: type[Strategy]) -> Entry:
    doc = inspect.getdoc(cls) if cls.__doc__ else ""
    begin, *parts = _SECTION.split(doc or "")
    told = {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    signature = inspect.signature(cls)
    fields = tuple(
        (
            name,
            "required" if field.is_required() else repr(signature.parameters[name].default),
            " ".join((field.description or "").split()),
        )
        for name, field in cls.model_fields.items()
        if name != "kind"
    )
    shipped = _shipped() if cls.__module__.startswith("conservtl.methods.") else {"rows": {}}
    rows = {
        name: {setting: value for setting, value in zip(shipped["settings"], values, strict=True) if value}
        for name, values in shipped["rows"].items()
        if re.fullmatch(rf"{cls.__name__}(,.*)?", name)
    }
    return Entry(
        cls.model_fields["kind"].default,
        tuple(cls.aliases),
        cls.__name__,
        begin.partition("\n")[0] or _UNKNOWN,
        begin.strip(),
        told.get("Reference", _UNKNOWN),
        told.get("Cost", _UNKNOWN),
        told.get("Hurts", _UNKNOWN),
        rows,
        fields,
    )


def _gain(entry: Entry) -> str:
    for variant, values in entry.gains.items():
        return (f"{variant}: " if variant != entry.name else "") + _settings(values)
    return "not measured"


def _settings(values: dict[str, str]) -> str:
    return ", ".join(f"{value} ({setting})" for setting, value in values.items())


def _shipped() -> Any:
    return json.loads(files("conservtl.report.text").joinpath("gains.json").read_text(encoding="utf-8"))
