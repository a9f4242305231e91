"""Write what others build on as it is imported now; CONTRIBUTING.md says how it may change.

- ``conservtl/__init__.pyi``: the public names, with the methods found at run time, for type checkers;
- ``tests/api/public.txt``: the signatures of public names, and the options of the command line;
- ``tests/api/schema.json``: the JSON schema of a spec, without descriptions and titles.

python tests/write_stub.py
"""

import enum
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import conservtl
import conservtl.experiments.spec.spec
from conservtl.cli._main import app

STUB = Path(conservtl.__file__).with_suffix(".pyi")
PUBLIC = Path(__file__).with_name("api") / "public.txt"
SCHEMA = PUBLIC.with_name("schema.json")
MODULES = (
    "conservtl",
    "conservtl.bounds",
    "conservtl.data",
    "conservtl.integrations.lightning",
    "conservtl.integrations.peft",
    "conservtl.integrations.transformers",
    "conservtl.layers",
    "conservtl.methods",
    "conservtl.plan",
    "conservtl.spec_model",
    "conservtl.tasks.base",
    "conservtl.tasks.headline",
    "conservtl.testing",
)
"""Modules whose ``__all__`` is public."""
COMMANDS = "command line"
_BASES = ("conservtl.methods", "conservtl.plan", "conservtl.spec_model", "conservtl.tasks.base")


def stub() -> str:
    """The stub of the package as it is imported now."""
    names = {
        name: (getattr(conservtl, name).__module__, getattr(conservtl, name).__name__) for name in conservtl.__all__
    }
    names |= {old: names[new] for old, new in conservtl._RENAMED.items()}
    imports = sorted(f"from {module} import {own} as {name}" for name, (module, own) in names.items())
    listed = [f'    "{name}",' for name in sorted(conservtl.__all__, key=_case_order)]
    head = "# Written by tests/write_stub.py. Do not edit."
    return "\n".join([head, *imports, "", "__version__: str", "__all__ = [", *listed, "]", ""])


def _case_order(name: str) -> tuple[bool, bool, str]:
    """Constants, classes and functions apart, as ruff sorts them."""
    return name.upper() != name, name[0].islower(), name


def described(module: str) -> list[str]:
    """The lines of ``public.txt`` for one of ``MODULES``, or for ``COMMANDS``."""
    if module == COMMANDS:
        commands = typer.main.get_command(app).commands
        return [" ".join(["conservtl", name, *_options(commands[name])]) for name in sorted(commands)]
    found = importlib.import_module(module)
    lines = [line for name in sorted(found.__all__) for line in _lines(name, getattr(found, name))]
    renamed = getattr(found, "_RENAMED", {})
    return lines + [f"{old} = {new}  # deprecated" for old, new in sorted(renamed.items())]


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        words = "/".join([*parameter.opts, *parameter.secondary_opts])
        yield words if parameter.required else f"[{words}]"


def _lines(name: str, value: Any) -> Iterator[str]:
    """Yield the signature of a name, and those of a class's methods and properties."""
    if isinstance(value, enum.EnumMeta):
        yield f"{name}: {', '.join(f'{one.name} = {one.value!r}' for one in value)}"
    elif inspect.isclass(value):
        yield name if getattr(value, "_is_protocol", False) else _signature(name, value)
        yield from _members(value)
    else:
        yield _signature(name, value) if inspect.isroutine(value) else name


def _members(cls: type) -> Iterator[str]:
    """Yield what a class and its bases define, without bases that have a line of their own."""
    modules = map(importlib.import_module, _BASES)
    apart = [value for module in modules for name in module.__all__ if inspect.isclass(value := getattr(module, name))]
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is cls or (base.__module__.startswith("conservtl.") and base not in apart):
            members |= vars(base) | _annotations(base)
    for member, found in sorted(members.items()):
        if member.startswith("_") or member == "test_fields":
            continue
        if found == "ClassVar[Aliases]":
            yield f"  .{member}: {', '.join(sorted(getattr(cls, member)))}".rstrip()
        elif isinstance(found, str) and found.startswith("ClassVar"):
            yield f"  .{member}: {found}"
        elif isinstance(found, property):
            yield f"  .{member} -> {inspect.get_annotations(found.fget).get('return', '')}"
        elif isinstance(found, (classmethod, staticmethod)) or inspect.isfunction(found):
            yield _signature(f"  .{member}", getattr(found, "__func__", found))


def _annotations(cls: type) -> dict[str, str]:
    """Annotations as the source writes them."""
    return {name: text for name, text in inspect.get_annotations(cls).items() if isinstance(text, str)}


def _signature(name: str, value: Any) -> str:
    """The signature with annotations as the source writes them, which no version of Python or Pydantic changes."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"{name}({', '.join(base.__name__ for base in value.__bases__)})"
    signature = inspect.signature(value)
    written: dict[str, str] = {}
    for base in reversed(value.__mro__ if inspect.isclass(value) else ()):
        written |= _annotations(base)
    parameters: list[str] = []
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not any(text.startswith("*") for text in parameters):
            parameters.append("*")
        star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        text = written.get(one.name, one.annotation)
        annotation = (
            "" if text is one.empty else f": {text if isinstance(text, str) else inspect.formatannotation(text)}"
        )
        default = "" if one.default is one.empty else f" = {getattr(one.default, '__qualname__', repr(one.default))}"
        parameters.append(f"{star}{one.name}{annotation}{default}")
    result = signature.return_annotation
    returned = f" -> {result}" if isinstance(result, str) and not inspect.isclass(value) else ""
    return f"{name}({', '.join(parameters)}){returned}"


def public(modules: tuple[str, ...] = (*MODULES, COMMANDS)) -> str:
    """The text of ``public.txt``: a section for each module."""
    sections = ["\n".join([f"[{module}]", *described(module), ""]) for module in modules]
    return "\n".join(["# Written by tests/write_stub.py. Do not edit.", "", *sections])


def sections(text: str) -> dict[str, list[str]]:
    """Name of a section of ``public.txt`` -> its lines."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("["):
            found[line.strip("[]")] = lines = []
        elif line:
            lines.append(line)
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of a spec, without its prose. No strategy or task but the built-in ones may be imported."""
    return _bare(json.loads(conservtl.experiments.spec.spec.schema()))


def _bare(value: Any) -> Any:
    """A schema without descriptions and titles; a field of that name is a schema itself and stays."""
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if isinstance(value, dict):
        prose = {key for key in ("description", "title") if isinstance(value.get(key), str)}
        return {key: _bare(one) for key, one in value.items() if key not in prose}
    return value


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")  # before integrations are imported
    STUB.write_text(stub(), encoding="utf-8")
    PUBLIC.write_text(public(), encoding="utf-8")
