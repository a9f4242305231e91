"""Naming what a person probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase that lists the known names closest to ``name``.

    >>> nearest("resnet81", ["resnet18", "vgg11"])
    'The nearest are: resnet18.'
    >>> nearest("zzz", ["resnet18"])
    'None is near.'
    """
    by_lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return f"The nearest are: {', '.join(by_lower[one] for one in close)}." if close else "None is near."
