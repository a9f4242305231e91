"""What a LightningModule and its Trainer hand over: the adaptation, the number of epochs, an optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.schedule import phase_of_epoch
from conservtl.errors import SpecError
from conservtl.integrations._passes import outermost
from conservtl.plan.plan import Plan

__all__ = ["class_and_options", "find_adaptation", "phases_of"]


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


def phases_of(plan: Plan, epochs: int | None) -> list[int]:
    """Return the phase of each epoch; without an end, the last phase goes on.

    Raises:
        SpecError: the phases do not fit the number of epochs.
    """
    phases = plan.phases
    if epochs is not None and epochs >= 0:
        try:
            return phase_of_epoch(plan, epochs)
        except SpecError as error:
            raise SpecError(str(error).replace("training.epochs", "Trainer(max_epochs=...)")) from None
    lengths = [phase.epochs for phase in phases[:-1] if isinstance(phase.epochs, int)]
    if len(lengths) < len(phases) - 1:
        raise SpecError(
            "Conserve: a phase lasts a share of the run, but Trainer(max_epochs=...) is not set. Set it, or give "
            "phases a number of epochs."
        )
    return [number for number, length in enumerate(lengths) for _ in range(length)] + [len(phases) - 1]


def class_and_options(made: Any) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return an optimizer's class and the arguments that differ from its defaults.

    LightningCLI hands over a partial of a function of its own, with the class among its arguments and every default
    written out; a weight decay that nobody asked for would contradict a pull.
    """
    if not isinstance(made, functools.partial):
        return made, {}
    cls = next((argument for argument in made.args if isinstance(argument, type)), made.func)
    known = inspect.signature(cls).parameters
    options = {
        name: value
        for name, value in made.keywords.items()
        if name == "lr"
        or name not in known
        or known[name].default is inspect.Parameter.empty
        or known[name].default != value
    }
    return cls, options
