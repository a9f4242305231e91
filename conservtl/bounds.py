"""Types of bounded numbers, and of paths, for the fields of specs, plans and decisions.

Use these instead of writing ``Annotated[float, Field(ge=0, ...)]`` again. A bound that a single field needs
(``le=96_000``) stays in that field. The bounds are plain annotations, which other libraries read too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, SupportsFloat

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan

from conservtl.errors import SpecError

__all__ = [
    "Count",
    "Fraction",
    "NonNegative",
    "NonNegativeInt",
    "Place",
    "Positive",
    "ProperShare",
    "Share",
    "as_path",
    "check_names",
    "is_number",
]

NonNegative = Annotated[float, Ge(0), AllowInfNan(False)]
"""A finite number of at least 0: a strength."""
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
"""A finite number above 0: a learning rate, a temperature."""
Share = Annotated[float, Ge(0), Le(1)]
"""0 to 1, both included."""
Fraction = Annotated[float, Gt(0), Le(1)]
"""Above 0, up to 1 included."""
ProperShare = Annotated[float, Ge(0), Lt(1)]
"""0 included, below 1: a dropout probability, a part held out."""
Count = Annotated[int, Ge(1), Le(2**63 - 1)]
"""A whole number of at least 1, of 64 bits: steps, epochs, examples."""
NonNegativeInt = Annotated[int, Ge(0), Le(2**63 - 1)]
"""A whole number of at least 0, of 64 bits: a seed, an index."""


def is_number(value: Any) -> bool:
    """Return whether a value is one real number, of NumPy or torch too; True and False are none.

    >>> is_number(1), is_number(True), is_number("1")
    (True, False, False)
    """
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    return isinstance(value, SupportsFloat) and not boolean and not getattr(value, "ndim", 0)


def as_path(given: Any, name: str) -> Path:
    """Return the path that an argument of this name is.

    Raises:
        SpecError: it is none.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise SpecError(f"{name} must be a path; received {given!r:.60}. Give a text or a pathlib.Path.")
    return Path(given)


def check_names(path: Path) -> Path:
    """Return a path that file systems can name.

    Raises:
        ValueError: a name in it is too long, or holds a zero byte.
    """
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _NAME_BYTES or "\0" in str(path):
        raise ValueError(f"a path must have names of at most {_NAME_BYTES} bytes, without a zero byte")
    return path


_NAME_BYTES = 255
Place = Annotated[Path, AfterValidator(check_names)]
"""The path of a file or folder, which file systems can name."""
