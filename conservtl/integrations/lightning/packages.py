"""Lightning under each of its names."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from conservtl.extras import require

__all__ = ["PACKAGES"]


def _packages() -> list[Any]:
    """Return Lightning under each of its names that is installed: classes of one are foreign to the other's Trainer."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            found.append(importlib.import_module(name))
    return found or [require("lightning.pytorch", "lightning")]


PACKAGES = _packages()
