"""The adaptation of a LightningModule."""

from __future__ import annotations

from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.integrations._passes import outermost

__all__ = ["find_adaptation"]


def find_adaptation(given: Any, pl_module: Any, known: Adaptation | None) -> Adaptation:
    """Return the adaptation that was given, or that the LightningModule has or makes.

    Raises:
        SpecError: there is none, or the LightningModule does not contain its model.
    """
    found = given
    if found is None:
        found = getattr(pl_module, "adaptation", None)
    elif not isinstance(found, Adaptation) and callable(found):
        found = known or found(pl_module)
    if not isinstance(found, Adaptation):
        owner = type(pl_module).__name__
        received = f"received {type(found).__name__}"
        if found is None and given is None:
            others = [name for name, value in vars(pl_module).items() if isinstance(value, Adaptation)]
            fix = f"Its self.{others[0]} is one: rename it" if others else "Set it before fit begins"
            received = f"{owner} has no such attribute. {fix}"
        raise SpecError(
            "Conserve takes the result of adapt(model, source, ...), a function of the LightningModule that "
            f"returns it, or nothing if {owner} has it as self.adaptation; {received}."
        )
    if outermost(pl_module, found.model) is None:
        raise SpecError(
            f"Conserve: {type(pl_module).__name__} must contain the model that was adapted, a "
            f"{type(found.model).__name__}, but none of its modules is that object. Adapt self.model itself, not a "
            "copy."
        )
    return found
