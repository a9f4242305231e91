"""Raise an error that names the missing extra before hypothesis is imported."""

from conservtl.extras import require

__all__: list[str] = []

require("hypothesis", "dev")
