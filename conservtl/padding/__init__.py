"""Padding: positions of each example that do not count."""

from conservtl.padding.finding import completed, find_padding, names_padding, padding_of_outputs, padding_of_rows
from conservtl.padding.positions import Padding, Resampling

__all__ = [
    "Padding",
    "Resampling",
    "completed",
    "find_padding",
    "names_padding",
    "padding_of_outputs",
    "padding_of_rows",
]
