"""A copy of a model with random values in the place of pretrained ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from conservtl.errors import SpecError
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy

__all__ = ["blank"]

_RESETS = ("reset_parameters", "_reset_parameters")


def blank(model: nn.Module) -> nn.Module:
    """Return a copy whose trained parameters are initialised anew, by the modules' own ``reset_parameters``.

    A model of Hugging Face is made anew from its configuration. Modules whose parameters all ask for no gradient (a
    fixed filter bank) keep their values.

    Raises:
        SpecError: a module holds parameters and cannot initialise them.
    """
    bare = unwrap(model)
    config: Any = getattr(bare, "config", None)
    if config is not None and hasattr(bare, "from_pretrained"):
        made: Any = type(bare)
        return made(config).to(next(bare.parameters()).device)  # type: ignore[no-any-return]
    copied = deep_copy(bare)
    for name, module in copied.named_modules():
        own = list(module.parameters(recurse=False))
        reset = next((found for each in _RESETS if callable(found := getattr(module, each, None))), None)
        if reset is not None and (not own or any(parameter.requires_grad for parameter in own)):
            reset()
        elif any(parameter.requires_grad for parameter in own):
            raise SpecError(
                f"model: to begin at random values, every module must have a method reset_parameters; "
                f"{name or 'the model'!r} ({type(module).__name__}) holds parameters and has none. Pass a function "
                "that builds the network with random values."
            )
    return copied
