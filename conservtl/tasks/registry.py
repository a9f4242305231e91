"""Tasks by name: the built-in ones, those of installed packages, and those of imported modules."""

from __future__ import annotations

import importlib
import pkgutil

import conservtl.tasks
from conservtl.errors import SpecError, did_you_mean
from conservtl.plugins import load_entry_points
from conservtl.tasks.base import Task, task_classes, unfinished_task

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


def task_named(name: str, module: str | None = None) -> Task:
    """Return the task of this name.

    Args:
        name: its name in a spec.
        module: the module that defines it, if known, for the error message.

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
