"""The command line: plan, run, predict, compare, sweep, tune, recommend, lr-find, merge, methods, push, schema."""

from __future__ import annotations

from conservtl.cli._app import app
from conservtl.cli._main import main

__all__ = ["app", "main"]
