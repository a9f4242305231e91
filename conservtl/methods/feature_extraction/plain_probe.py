"""A head that is fed from layers, as a graph of torch's operations without hooks."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from conservtl.compat import forward_hooks
from conservtl.errors import SpecError
from conservtl.layers.plain import portable
from conservtl.methods.feature_extraction.probe_head import ProbeHead, ProbeTap, Seen, remove_taps

__all__ = ["plain_probe"]


def plain_probe(model: nn.Module) -> nn.Module:
    """Return a model whose head is fed from layers as a ``torch.fx.GraphModule`` without hooks.

    Args:
        model: a copy, unwrapped; returned as it is if its head is its own.

    Raises:
        SpecError: torch.fx cannot trace the model, or it has made no forward pass.
    """
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, ProbeHead)]
    if not heads:
        return model
    name, head = heads[0]
    taps = {
        place: hook
        for place, module in model.named_modules()
        for hook in forward_hooks(module)
        if isinstance(hook, ProbeTap)
    }
    seen = {tap.layer: tap.seen for tap in taps.values()}
    if None in seen.values():
        raise SpecError("export: how the head is fed is seen in a forward pass. Call the model once before.")
    remove_taps(model)
    try:
        graph = portable(_Tracer({*taps, name}).trace(model))
    except Exception as error:
        raise SpecError(
            f"export: FeatureExtraction feeds the head from layers inside {type(model).__name__}, which takes "
            f"torch.fx to trace the model, and it cannot: {error}. Leave layers out, or export a program: "
            "torch.export.export(adaptation.model, ...)."
        ) from error
    _feed(graph, name, head, {place: tap.layer for place, tap in taps.items()}, seen)
    plain = fx.GraphModule(model, graph, type(model).__name__)
    plain.set_submodule(name, _linear(head))
    return plain


class _Tracer(fx.Tracer):
    """Traces a model; modules of these names are called."""

    def __init__(self, called: Collection[str]) -> None:
        super().__init__()
        self._called = called

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._called or super().is_leaf_module(m, module_qualified_name)


def _feed(graph: fx.Graph, name: str, head: ProbeHead, layers: dict[str, str], seen: dict[str, Any]) -> None:
    """Give the head the means of its layers, and its output the dimensions that the replaced head gave."""
    pooled: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        if (layer := layers.get(str(node.target))) is not None:
            # Before the next module, which may overwrite it.
            with graph.inserting_before(node.next):
                pooled[layer] = _pooled(graph, node, seen[layer])
        if node.target != name:
            continue
        with graph.inserting_before(node):
            own = [_pooled(graph, node.args[0], Seen(0, 1, head.ndim))] if head.own else []
            features = graph.call_function(torch.cat, ([*(pooled[layer] for layer in head.layers), *own], 1))
            scores = graph.call_module(name, (features,))
            if head.ndim > 2:
                scores = graph.call_method("reshape", (scores, -1, len(head.weight), *[1] * (head.ndim - 2)))
        node.replace_all_uses_with(scores)
        graph.erase_node(node)


def _pooled(graph: fx.Graph, value: Any, seen: Seen) -> fx.Node:
    """Add the means over positions of a layer's output."""
    for _ in range(seen.depth):
        value = graph.call_function(getitem, (value, 0))
    if seen.ndim == 2:
        return graph.call_method("clone", (value,))
    moved = graph.call_method("movedim", (value, seen.axis, 1))
    return graph.call_method("mean", (graph.call_method("flatten", (moved, 2)), 2))


def _linear(head: ProbeHead) -> nn.Linear:
    plain = nn.Linear(1, 1, device="meta")
    plain.in_features, plain.out_features = head.in_features, head.out_features
    plain.weight, plain.bias = head.weight, head.bias
    return plain
