"""Fields of a spec that are marked with a range, for a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from conservtl.errors import SpecError
from conservtl.spec_model import FrozenModel, checked

__all__ = ["SearchRange", "ranges_of"]


class SearchRange(FrozenModel):
    """A field to be searched: ``{range: [1, 100], log: true}``, or ``{choices: [adamw, sgd]}``."""

    range: tuple[float, float] | None = None
    """Lowest and highest value; whole numbers if both are whole."""
    log: bool = False
    """Whether to draw on a logarithmic scale."""
    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """The values to choose from."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.range is None) == (self.choices is None):
            raise ValueError("a searched field has either a range or choices")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"the range must rise; received {list(self.range)}")
        if self.range is not None and self.log and self.range[0] <= 0:
            raise ValueError(f"a range over decades begins above 0; received {list(self.range)}")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return self.range is not None and not self.log and all(value == int(value) for value in self.range)

    def first(self) -> Any:
        """Return one of its values."""
        if self.choices is not None:
            return self.choices[0]
        low = (self.range or (0.0, 0.0))[0]
        return int(low) if self.whole else low


def ranges_of(content: Mapping[str, Any]) -> dict[str, SearchRange]:
    """Return the range of each marked field, by dotted name, of a spec that is read but not validated.

    Raises:
        SpecError: a range is malformed, or no field is marked.
    """
    ranges = dict(_walk(content, ""))
    if not ranges:
        raise SpecError(
            "tune: no field is marked with a range. Write, say, alpha: {range: [1, 100], log: true} or "
            "optimizer: {choices: [adamw, sgd]} in place of a value."
        )
    return ranges


def _walk(value: Any, place: str) -> list[tuple[str, SearchRange]]:
    if (
        isinstance(value, Mapping)
        and value.keys() & {"range", "choices"}
        and value.keys() <= {"range", "choices", "log"}
    ):
        return [(place, checked(SearchRange, value, place))]
    if isinstance(value, Mapping):
        items: Any = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    return [mark for key, inner in items for mark in _walk(inner, f"{place}.{key}".lstrip("."))]
