"""Models of runs: copies of one that a program holds, as it is or with random values, or new ones from its function."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from conservtl.compat import reset_method
from conservtl.errors import SpecError
from conservtl.experiments.own.options import ModelLike
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy

__all__ = ["Maker", "blank"]


class Maker:
    """Makes a new model, which nothing else holds, in each call.

    Args:
        given: a model, which is copied; or a function that returns a new one.

    Raises:
        SpecError: it is neither; or, when called, the function needs arguments, returns no model, or one it has
            returned before.
    """

    def __init__(self, given: ModelLike) -> None:
        if not callable(given):
            raise SpecError(
                f"model must be a torch.nn.Module, or a function that returns one; received {type(given).__name__}."
            )
        self.given = given
        self._last: nn.Module | None = None

    @property
    def calls(self) -> bool:
        """Whether models come from a function."""
        return not isinstance(self.given, nn.Module)

    def __call__(self) -> nn.Module:
        """Return a new model."""
        if isinstance(self.given, nn.Module):
            return deep_copy(self.given)
        self._check_signature()
        made = self.given()
        if not isinstance(made, nn.Module):
            raise SpecError(f"model() must return a torch.nn.Module; it returns {type(made).__name__}.")
        if made is self._last:
            raise SpecError(
                "model() must return a new model in each call, because every run trains its own; it returns the same "
                "one again. Pass the model itself, which is copied, or build it inside the function."
            )
        self._last = made
        return made

    def _check_signature(self) -> None:
        try:
            inspect.signature(self.given).bind()
        except TypeError as error:
            raise SpecError(
                f"model must be a function without arguments, which is called for each run; calling it: {error}. Pass "
                "lambda: network(...)."
            ) from error
        except ValueError:  # a builtin without a signature
            pass

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "_last": None}


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
        reset = reset_method(module)
        if reset is not None and (not own or any(parameter.requires_grad for parameter in own)):
            reset()
        elif any(parameter.requires_grad for parameter in own):
            raise SpecError(
                f"model: to begin at random values, every module must have a method reset_parameters; "
                f"{name or 'the model'!r} ({type(module).__name__}) holds parameters and has none. Pass a function "
                "that builds the network with random values."
            )
    return copied
