"""The number of labelled target examples to adapt with: of each class, all there are, or up to a most."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from conservtl.bounds import Count
from conservtl.spec_model import FrozenModel

__all__ = ["Shots", "UpTo", "may_validate", "number_of_shots", "taken_text"]


class UpTo(FrozenModel):
    """A most: as many examples of each class as there are, up to this number."""

    up_to: Count
    """Largest number of examples of each class."""


def _checked(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise PydanticCustomError(
            "shots", "Input should be a whole number greater than or equal to 1, 'all', or {up_to: a number}"
        ) from error


Shots = Annotated[Count | Literal["all"] | UpTo, WrapValidator(_checked)]
"""A number of each class; ``all`` there are; or ``{up_to: 5}``, which takes fewer of a class that has fewer."""


def number_of_shots(shots: Any, available: int, spare: int = 0) -> int:
    """Return how many of the available examples of a class are taken.

    "all" and ``UpTo`` leave ``spare`` of them to test on, and take at least one.

    >>> number_of_shots(UpTo(up_to=5), 3, spare=1), number_of_shots("all", 30)
    (2, 30)
    """
    if isinstance(shots, int):
        return shots
    most = shots.up_to if isinstance(shots, UpTo) else available
    return min(most, max(1, available - spare))


def may_validate(shots: Any) -> bool:
    """Return whether a class can have a second example, for validation."""
    return shots == "all" or (shots.up_to if isinstance(shots, UpTo) else shots) >= 2


def taken_text(counts: Collection[int]) -> str:
    """Return how many examples of each class were taken: "3 to 5"; empty if that is not known."""
    if not counts:
        return ""
    fewest, most = min(counts), max(counts)
    return str(most) if fewest == most else f"{fewest} to {most}"
