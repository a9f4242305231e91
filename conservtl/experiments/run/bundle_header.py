"""The header of a saved model: what it is built with, and how it was extended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.earlier_run import describe_example, saved_example, saved_extensions, saved_strategies
from conservtl.adaptation.origin import Structure
from conservtl.layers import find_layers
from conservtl.methods import extend_all
from conservtl.plan.decision import apply_extensions

__all__ = ["extend_model", "merged_model"]


def merged_model(adaptation: Adaptation, structure: Structure) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of the model with additions merged where that is exact, and the header's part for the others.

    An adapter of PEFT is merged and unloaded.
    """
    model: nn.Module = adaptation.merged()
    unload: Any = getattr(model, "merge_and_unload", None)
    if callable(unload):
        model = unload()
    left = [one for one in (*adaptation.origin.inherited, *adaptation.origin.strategies) if not one.merge(model)]
    extensions = adaptation.plan.extensions
    if not left and not extensions:
        return model, {}
    described = {
        "strategies": [one.model_dump(mode="json") for one in left],
        "extensions": [one.model_dump(mode="json") for one in extensions],
        "example": None if structure.example is None else describe_example(structure.example),
        "layers": structure.layers,
        "head": structure.head,
        "modules": sorted({type(one).__module__ for one in (*left, *extensions)}),
    }
    return model, {"extended": described}


def extend_model(model: nn.Module, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Extend a model that was built as a header says, in place, as the run did that wrote the header.

    Returns:
        Name of each added parameter -> its tensor at the identity, as after a merge.

    Raises:
        SourceError: a strategy or an extension of a user's own is not imported; the message names its module.
    """
    if (extended := header.get("extended")) is None:
        return {}
    example = saved_example(header)
    extensions = saved_extensions(header)
    added, cut = extend_all(model, saved_strategies(header), example, extended.get("layers"), extended.get("head"))
    if extensions:
        apply_extensions(model, extensions, find_layers(model, example, cut))
    tensors = model.state_dict()
    return {name: tensors[name] for name in added}
