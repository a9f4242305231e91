"""The command line: plan, run, predict, compare, sweep, tune, recommend, lr-find, merge, methods, push, schema."""

from __future__ import annotations

from conservtl.cli._main import app, main

__all__ = ["app", "main"]
