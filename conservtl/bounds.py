"""Types of bounded numbers for the fields of specs, plans and decisions.

Use these instead of writing ``Annotated[float, Field(ge=0, ...)]`` again. A bound that a single field needs
(``le=96_000``) stays in that field. The bounds are plain annotations, which other libraries read too.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan

__all__ = ["Count", "Fraction", "NonNegative", "NonNegativeInt", "Positive", "ProperShare", "Share"]

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
Count = Annotated[int, Ge(1)]
"""A whole number of at least 1: steps, epochs, examples."""
NonNegativeInt = Annotated[int, Ge(0)]
"""A whole number of at least 0: a seed, an index."""
