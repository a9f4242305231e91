"""Tasks by name: the built-in ones, those of installed packages, and those of imported modules."""

from __future__ import annotations

import importlib
import pkgutil

import conservtl.tasks
from conservtl.errors import SpecError, hint
from conservtl.plugins import load_entry_points
from conservtl.tasks.base import Task, task_classes

__all__ = ["task_named", "tasks"]

ENTRY_POINTS = "conservtl.tasks"
"""Entry point group of packages that bring tasks of their own."""


def tasks() -> dict[str, Task]:
    """Return every known task by name.

    Raises:
        SpecError: an installed package declares a task that cannot be loaded.
    """
    for module in pkgutil.iter_modules(conservtl.tasks.__path__):
        if module.ispkg:
            importlib.import_module(f"conservtl.tasks.{module.name}")
    load_entry_points(ENTRY_POINTS)
    return {name: cls() for name, cls in sorted(task_classes().items())}


def task_named(name: str) -> Task:
    """Return the task of this name.

    Raises:
        SpecError: no such task is known.
    """
    known = tasks()
    if name not in known:
        raise SpecError(
            f"task: {name!r} is none of {', '.join(known)}.{hint(name, list(known))} A task of your own is found "
            "once its module is imported: pass --import MODULE."
        )
    return known[name]
