"""The head of a planned model: its modules and parameters."""

from __future__ import annotations

from conservtl.errors import SpecError
from conservtl.layers.names import owner
from conservtl.plan._fields import PlanFields
from conservtl.plan.row import Row

__all__ = ["PlanWithHead"]


class PlanWithHead(PlanFields):
    """A plan that knows which parameters are the head's."""

    @property
    def head(self) -> tuple[str, ...]:
        """Parameters of the head's modules: the classifier, without the norm that joined its layer.

        Raises:
            SpecError: several modules may be the head.
        """
        modules = set(self.head_modules)
        return tuple(row.name for row in self.rows if modules & set(_owners(row)))

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the head's modules; of the last weight's module if the head was not told.

        Raises:
            SpecError: several modules may be the head.
        """
        if self.heads:
            return self.heads
        if self.head_candidates:
            raise SpecError(
                f"head: it must be known which module is the head; {list(self.head_candidates)} may be, each computing "
                f"an output. Name it (or them): adapt(..., head=[{self.head_candidates[0]!r}]), in a spec model.head. "
                "If no example was given, adapt(..., example=...) may tell it."
            )
        last = [row for row in self.rows if row.layer == self.layers[-1]]
        weights = [row for row in last if row.kind == "weight"]
        return (owner((weights or last)[-1].name),)

    @property
    def source_rows(self) -> tuple[int | None, ...] | None:
        """For each output, that of the source with its label, if a head is copied by label; else None."""
        return next((row.source_rows for row in self.rows if row.source_rows is not None), None)

    @property
    def head_module(self) -> str:
        """Name of the head's module.

        Raises:
            SpecError: the head has several modules, or several may be the head.
        """
        if len(self.head_modules) > 1:
            raise SpecError(
                f"head: one module is needed here; the head is {list(self.head_modules)}. Name one of them."
            )
        return self.head_modules[0]

    @property
    def possible_head(self) -> frozenset[str]:
        """Parameters of all modules that may be the head."""
        modules = set(self.head_candidates if not self.heads and self.head_candidates else self.head_modules)
        return frozenset(row.name for row in self.rows if modules & set(_owners(row)))

    @property
    def tied_head(self) -> tuple[str, ...]:
        """Parameters of the head that a module outside it holds too: an embedding, of a language model."""
        modules = set(self.head_modules)
        return tuple(name for name in self.head if set(_owners(self[name])) - modules)


def _owners(row: Row) -> list[str]:
    """Return the modules that hold a parameter; several for a tied one."""
    return [owner(name) for name in (row.name, *row.aliases)]
