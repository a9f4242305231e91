"""Types of bounded numbers for the fields of specs, plans and decisions.

Use these instead of writing ``Annotated[float, Field(ge=0, ...)]`` again. A bound that a single field needs
(``le=96_000``) stays in that field.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Fraction", "NonNegative", "NonNegativeInt", "Positive", "ProperShare", "Share"]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of at least 0: a strength."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0: a learning rate, a temperature."""
Share = Annotated[float, Field(ge=0, le=1)]
"""0 to 1, both included."""
Fraction = Annotated[float, Field(gt=0, le=1)]
"""Above 0, up to 1 included."""
ProperShare = Annotated[float, Field(ge=0, lt=1)]
"""0 included, below 1: a dropout probability, a part held out."""
Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1: steps, epochs, examples."""
NonNegativeInt = Annotated[int, Field(ge=0)]
"""A whole number of at least 0: a seed, an index."""
