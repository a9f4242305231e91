"""Modules of torch alone in the place of modules that need conservtl to run or to be unpickled."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

__all__ = ["behind", "plain_module", "portable", "replace_module"]


class _Tracer(fx.Tracer):
    """Traces a module of a few operations; its children are called, whatever they are."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - as in fx
        return True


def plain_module(module: nn.Module) -> nn.Module:
    """Return a module with the same tensors and children that computes the same, made of torch's operations.

    It is a ``torch.fx.GraphModule``, which holds its own code, so that a pickle of it needs torch only.

    Its ``forward`` has no control flow that depends on tensors.
    """
    graph = portable(_Tracer().trace(module))
    found = fx.GraphModule(module, graph, type(module).__name__.lstrip("_"))
    found.train(module.training)
    return found


def portable(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph that can be pickled: without its tracer's class, and annotations that are text."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        node.type = None
    return copied


def behind(first: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """Return a model that applies a module to its first input, and has the arguments of another."""
    graph = fx.Graph()
    arguments: list[fx.Node] = []
    named: dict[str, Any] = {}
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = () if parameter.default is parameter.empty else (parameter.default,)
        node = graph.create_node("placeholder", parameter.name, default, name=parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = node
        else:
            arguments.append(node)
    entered = graph.call_module(name, (arguments[0],))
    graph.output(graph.call_module("model", (entered, *arguments[1:]), named))
    root = nn.Module()
    root.add_module(name, first)
    root.add_module("model", model)
    return fx.GraphModule(root, graph, type(model).__name__)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module into the place of another wherever a model holds it, and return the model: ``new`` if it was all."""
    for parent in list(model.modules()):
        holders: dict[str, Any] = dict(parent.named_children())
        for name, child in holders.items():
            if child is old and parent is not new:
                setattr(parent, name, new)
    return new if model is old else model
