"""Tasks by name: the built-in ones, those of installed packages, and those of imported modules."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import conservtl.tasks
from conservtl.errors import SpecError, did_you_mean
from conservtl.plugins import load_entry_points
from conservtl.tasks.base import Task, task_classes

__all__ = ["task_named", "tasks", "unfinished_task"]

ENTRY_POINTS = "conservtl.tasks"
"""Entry point group of packages that bring tasks of their own."""


def tasks() -> dict[str, Task]:
    """Return every known task by name, those of installed packages among them."""
    for module in pkgutil.iter_modules(conservtl.tasks.__path__):
        if module.ispkg:
            importlib.import_module(f"conservtl.tasks.{module.name}")
    load_entry_points(ENTRY_POINTS)
    return {name: cls() for name, cls in sorted(task_classes().items())}


def task_named(name: str, module: str | None = None) -> Task:
    """Return the task of this name in a spec; ``module`` defines it, if that is known, for the error message.

    Raises:
        SpecError: no such task is known.
    """
    known = tasks()
    if name not in known:
        fix = unfinished_task(
            name,
            f"{did_you_mean(name, known)} A task of your own is known once its module is imported. In Python, import "
            f"it first; on the command line: --import {module or 'MODULE'}.",
        )
        raise SpecError(f"task: {name!r} is none of {', '.join(known)}.{fix}")
    return known[name]


def unfinished_task(name: str, otherwise: str) -> str:
    """Return what to do about an unknown task: finish the class that is imported, or import it."""
    if (cls := task_classes(unfinished=True).get(name)) is not None:
        lacks = ", ".join(sorted(cls.__abstractmethods__))
        return f" {name!r} is imported, but {cls.__module__}.{cls.__qualname__} does not implement {lacks}."
    nameless = [cls for cls in _subclasses(Task) if not hasattr(cls, "name") and _is_a_users(cls)]
    listed = ", ".join(sorted({f"{cls.__module__}.{cls.__qualname__}" for cls in nameless}))
    more = f" {listed} is imported, but has no name: declare it in the class, name = {name!r}." if listed else ""
    return otherwise + more


def _is_a_users(cls: type[Task]) -> bool:
    """Return whether a class is complete, and none of this package's, which need no name."""
    return not inspect.isabstract(cls) and cls.__module__.partition(".")[0] != __name__.partition(".")[0]


def _subclasses(cls: Any) -> list[type[Task]]:
    """Return the subclasses of a class, and theirs."""
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]
