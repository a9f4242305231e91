"""The optimizer that a Trainer's arguments name, as a class and the arguments that ``Adaptation.optimizer`` takes."""

from __future__ import annotations

import inspect
from typing import Any

from conservtl.errors import SpecError

__all__ = ["optimizer_class"]

_BUILDERS = {"params", "model", "optimizer_dict"}
"""Arguments by which the Trainer hands over parameters, not the class's own."""


def optimizer_class(trainer: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of the optimizer that ``trainer.args.optim`` names.

    The options hold the weight decay of the arguments, 0 included: the Trainer's default is 0, that of a class may not
    be. Biases and norms have none, as in a plain Trainer.

    Raises:
        SpecError: the optimizer takes no groups by name.
    """
    args = trainer.args
    given = trainer.optimizer_cls_and_kwargs
    cls, options = given if given is not None else trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    named = f"optim={getattr(args.optim, 'value', args.optim)!r}" if given is None else getattr(cls, "__name__", cls)
    alone = None
    if isinstance(cls, type) and not hasattr(cls, "step"):
        alone = "is built from the whole model"
    elif _BUILDERS & options.keys():
        alone = "chooses parameters by itself"
    elif "bitsandbytes" in str(cls) and options.get("optim_bits") == 8:
        alone = "keeps the state of embeddings apart"
    if alone:
        raise SpecError(
            f"{named} {alone}, so the plan's groups cannot be its groups. Choose another, such as optim='adamw_torch'."
        )
    if "weight_decay" in inspect.signature(cls).parameters:
        options = {"weight_decay": args.weight_decay, **options}
    return cls, options
