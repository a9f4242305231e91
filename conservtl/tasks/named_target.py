"""Targets that a data section names in its field ``target``."""

from __future__ import annotations

from typing import Any

from conservtl.data import Domains

__all__ = ["NamedTarget"]


class NamedTarget:
    """Methods of a task whose data section has the field ``target``, such as the name of a speaker."""

    def on_target(self, data: Any, target: str) -> dict[str, Any]:  # noqa: ARG002
        """Return the field that names the target."""
        return {"data.target": target}

    def target_name(self, data: Any, domains: Domains) -> str:  # noqa: ARG002
        """Return the target's name."""
        return str(data.target)
