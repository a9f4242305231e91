"""The header of a saved model: what it is built with, and how it was extended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from conservtl.adaptation.earlier_run import describe_example, saved_example, saved_extensions, saved_strategies
from conservtl.layers import find_layers
from conservtl.methods import extend_all
from conservtl.runtime.extending import apply_extensions
from conservtl.source.run_header import read_header

__all__ = ["describe_example", "extend_model", "read_header"]


def extend_model(model: nn.Module, header: Mapping[str, Any], *, strategies: bool = True) -> dict[str, Tensor]:
    """Extend a model in place as the run did that wrote a header.

    Args:
        model: built as the header says.
        header: what ``read_header`` returned.
        strategies: whether parameters that strategies added are added too.

    Returns:
        Name of each added parameter -> its tensor at the identity, as after a merge.

    Raises:
        SourceError: a strategy or an extension of a user's own is not imported; the message names its module.
    """
    if (extended := header.get("extended")) is None:
        return {}
    example = saved_example(header)
    chosen = saved_strategies(header) if strategies else ()
    extensions = saved_extensions(header)
    added, cut = extend_all(model, chosen, example, extended["layers"], extended.get("head"))
    if extensions:
        apply_extensions(model, extensions, find_layers(model, example, cut))
    tensors = model.state_dict()
    return {name: tensors[name] for name in added}
