"""Calls of a model with inputs as users pass them; labels among these reach the models that need them.

A model needs its labels if

- its ``forward`` has an argument ``labels`` without a default;
- it makes the decoder's inputs of them: its ``forward`` has arguments ``labels`` and ``decoder_input_ids`` (or another
  ``decoder_input...``), and the batch has none of the latter;
- it fails without them and not with them;
- the loss cannot be computed without them, as ``lambda outputs, batch: outputs.loss``, and can be with them.

The first two are read from the signature, the others tried on the first batch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from conservtl.errors import SpecError
from conservtl.layers import unwrap

__all__ = ["argument_names", "call", "call_with", "give_labels", "labels_for_loss", "takes_labels"]

_LISTS = re.compile(r"(<class ')?(typing\.|collections\.abc\.)?(list|tuple|sequence|iterable)\b", re.IGNORECASE)
_NEED: WeakSet[nn.Module] = WeakSet()


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's arguments, in order; without those of ``*args`` and ``**kwargs``."""
    bare = unwrap(model)
    with suppress(ValueError, TypeError):
        parameters = inspect.signature(bare.forward).parameters.values()
        names = tuple(one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
        inner = getattr(bare, "get_base_model", None)  # PEFT hides the arguments behind **kwargs
        if not names and callable(inner) and (base := inner()) is not bare:
            return argument_names(base)
        return names
    return ()


def takes_labels(model: nn.Module) -> bool:
    """Return whether a model's ``forward`` has an argument ``labels``."""
    return "labels" in argument_names(model)


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return the model's outputs for a dictionary of its arguments, with ``labels`` only if it needs them."""
    arguments = {key: value for key, value in batch.items() if key != "labels"}
    if "labels" not in batch:
        return model(**arguments)
    if _needs_labels(model, batch):
        return model(**batch)
    try:
        return model(**arguments)
    except Exception as error:
        if not takes_labels(model):
            raise
        try:
            outputs = model(**batch)
        except Exception:  # noqa: BLE001 - the labels do not help: the first error is the one to see
            raise error from None
        give_labels(model)
        return outputs


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Return the model's outputs for inputs: a tensor, a tuple or list of positional arguments, or a dictionary.

    A tuple or list is one argument of a model that needs one input, if it takes no others, or this one as a list by its
    annotation. Arguments with a default (``scale=1.0``), unlike optional inputs (``mask=None``), take no tensor.

    Raises:
        SpecError: the model needs several inputs, and there is another number of them.
    """
    if isinstance(inputs, Mapping):
        return call(model, inputs)
    if not isinstance(inputs, (tuple, list)):
        return model(inputs)
    try:
        parameters = list(inspect.signature(unwrap(model).forward).parameters.values())
    except (ValueError, TypeError):
        return model(*inputs)
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return model(*inputs)
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    needed = sum(one.default is one.empty for one in places)
    given = zip(places, inputs, strict=False)
    setting = any(isinstance(value, Tensor) and one.default not in (one.empty, None) for one, value in given)
    whole = setting or (bool(places) and bool(_LISTS.match(str(places[0].annotation))))
    if needed <= len(inputs) <= len(places) and (needed > 1 or not whole):
        return model(*inputs)
    if needed > 1:
        raise SpecError(
            f"inputs: {type(unwrap(model)).__name__} takes {', '.join(one.name for one in places)}; received a "
            f"{type(inputs).__name__} of {len(inputs)}. Give all that it needs, in this order, or a dictionary by name."
        )
    return model(inputs)


def give_labels(model: nn.Module) -> None:
    """Give a model its labels from now on."""
    _NEED.add(unwrap(model))


def labels_for_loss(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], loss: Callable[[Any, Any], Any]
) -> None:
    """Give a model its labels from now on if the loss of a batch cannot be computed without them.

    The model is in eval mode, without gradients.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch or not takes_labels(model):
        return
    if _needs_labels(model, batch) or _has_value(model, batch, forward, loss):
        return
    give_labels(model)
    if not _has_value(model, batch, forward, loss):
        _NEED.discard(unwrap(model))


def _has_value(model: nn.Module, batch: Any, forward: Callable[..., Any], loss: Callable[..., Any]) -> bool:
    try:
        return isinstance(loss(forward(model, batch), batch), Tensor)
    except Exception:  # noqa: BLE001 - whatever the reason, it is seen again in training
        return False


def _needs_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    bare = unwrap(model)
    if bare in _NEED:
        return True
    names = argument_names(bare)
    if "labels" not in names:
        return False
    if any(name.startswith("decoder_input") for name in names):
        return not any(name.startswith("decoder_input") for name in batch)
    parameter = inspect.signature(bare.forward).parameters.get("labels")
    return parameter is not None and parameter.default is parameter.empty
