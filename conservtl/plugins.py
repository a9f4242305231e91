"""Extensions of a user's own: modules named on the command line, and packages that declare entry points."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError, hint

__all__ = ["IMPORTABLE", "import_modules", "imported_modules", "is_imported", "load_entry_points", "named_callable"]

IMPORTABLE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""Pattern of the name of a function or class, ``package.module:name``."""

_IMPORTED: dict[str, None] = {}


def import_modules(names: Iterable[str]) -> None:
    """Import modules by dotted name or by path, so that the tasks and strategies in them register themselves.

    A dotted name is looked for in the current folder too, as ``python -m`` does.

    Raises:
        SpecError: a module cannot be imported; the message says why.
    """
    for name in names:
        path = Path(name)
        is_path = path.suffix == ".py" or "/" in name or "\\" in name
        if is_path and not path.exists():
            beside = [str(path.with_name(other.name)) for other in path.parent.glob("*") if _importable(other)]
            raise SpecError(f"--import {name!r}: there is no file {str(path)!r}.{hint(str(path), beside)}")
        folder, module = (path.resolve().parent, path.stem) if is_path else (Path.cwd(), name)
        added = str(folder) not in sys.path
        if added:
            sys.path.insert(0, str(folder))
        try:
            importlib.import_module(module)
        except Exception as error:
            if added:
                sys.path.remove(str(folder))
            raise SpecError(
                f"--import {name!r}: the module cannot be imported: {type(error).__name__}: {error}. Give a dotted "
                "name or a path, and install what the module needs."
            ) from error
        _IMPORTED[str(path.resolve()) if is_path else name] = None


def _importable(path: Path) -> bool:
    """Whether a path is that of a module or of a package."""
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def imported_modules() -> tuple[str, ...]:
    """Names given to ``import_modules`` so far: what a new process must import to know the same extensions."""
    return tuple(_IMPORTED)


def is_imported(module: str) -> bool:
    """Return whether a module, or a package that it is part of, was given to ``import_modules``."""
    given = {Path(name).stem if os.sep in name else name for name in _IMPORTED}  # paths are stored whole
    parts = module.split(".")
    return any(".".join(parts[:count]) in given for count in range(1, len(parts) + 1))


def named_callable(reference: str, field: str) -> Callable[..., Any]:
    """Return the function or class ``package.module:name`` that a spec's field names, of a package imported by hand.

    Raises:
        SpecError: its package was not imported by hand, cannot be imported, or has no such function or class.
    """
    module, _, name = reference.partition(":")
    if not is_imported(module):
        package = module.partition(".")[0]
        raise SpecError(
            f"{field} {reference!r} names code, which no spec runs by itself. If you trust it, add --import {package} "
            f"on the command line (in Python, conservtl.plugins.import_modules([{package!r}]))."
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise SpecError(f"{field} {reference!r}: {module} cannot be imported: {error}.") from error
    value = getattr(found, name, None)
    if not callable(value):
        known = [key for key, each in vars(found).items() if callable(each) and not key.startswith("_")]
        raise SpecError(f"{field} {reference!r}: {module} has no function {name!r}.{hint(name, known)}")
    return value  # type: ignore[no-any-return]


@cache
def load_entry_points(group: str) -> None:
    """Import everything that installed packages declare in an entry point group, once a process.

    Raises:
        SpecError: an entry point cannot be imported; the message names its package.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.value
            raise SpecError(
                f"entry point {point.name!r} of group {group!r} in package {package!r} cannot be loaded: "
                f"{type(error).__name__}: {error}. Repair or uninstall the package."
            ) from error
