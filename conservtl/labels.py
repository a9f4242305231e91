"""Labels in a batch of a model's arguments: they reach the models that need them.

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from conservtl.layers import unwrap

__all__ = ["argument_names", "call", "give_labels", "labels_for_loss", "takes_labels"]

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
