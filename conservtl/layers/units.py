"""A model cut into units: the layers, and the extras (norms, scales, tokens) that will join one.

The tree of modules is walked from the top. A module is kept whole where it is what a practitioner
calls a layer, and otherwise opened:

- one weight: a module with a single weight-bearing leaf below it (a convolution with its norm, a
  pooling head) is a layer, whatever its class;
- a block: a class that occurs at least twice (residual and transformer blocks);
- a bracket: one of three or more `nn.Sequential(conv, relu, conv, relu)` in one list;
- what stands beside blocks in a list, or alone in one, though its class occurs once.

A class that occurs twice may instead be a stage or a tower, when chains of blocks hold at least half
of its weight-bearing leaves: then it is opened. So is any other class that occurs once, hence wrappers
and backbones swallow nothing. A list of experts or of attention heads is no chain, because a block has a
norm of its own and they have none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from conservtl.compat import ConvBase, NormBase
from conservtl.layers.names import WRAPPED, canonical

__all__ = ["Node", "Unit", "is_norm", "join", "tree", "units"]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_BRACKET_WEIGHTS = 3
"""A longer chain of plain weights is a network (VGG), a shorter one a block."""
_BRACKETS = 3
"""Two brackets in a list are more often features and classifier."""


@dataclass(frozen=True)
class Unit:
    """A layer, or an extra that joins one.

    A `weight` (a convolution, a linear map) takes extras in; a `block` is complete without them.
    """

    name: str
    parent: str
    kind: Literal["weight", "block", "extra"]
    tensors: tuple[str, ...]
    modules: tuple[str, ...]
    embedding: bool = False


@dataclass(eq=False)
class Node:
    """A module that holds parameters or running statistics, by the names of first registration."""

    name: str
    parent: str
    module: nn.Module
    own: tuple[str, ...]
    """Its parameters; the running mean of a batch norm that has none."""
    children: list[Node] = field(default_factory=list)
    weights: int = 0
    """How many weight-bearing leaves there are at or below it."""
    has_norm: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors at or below it that decide where it belongs."""
        return self.own + tuple(name for child in self.children for name in child.tensors)


def join(*parts: str) -> str:
    """The dotted name of its parts, the root's empty name left out."""
    return ".".join(part for part in parts if part)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation: one of torch's, or so called with parameters along one axis at most."""
    if isinstance(module, _NORMS):
        return True
    called = "norm" in type(module).__name__.lower()
    return called and all(sum(size > 1 for size in p.shape) <= 1 for p in module.parameters())


def tree(model: nn.Module, first: dict[int, str]) -> Node | None:
    """The nodes of an unwrapped model.

    Args:
        model: The model.
        first: id of a parameter -> its canonical name; under another name it is not seen again.
    """
    return _node("", "", model, first, set())


def _node(name: str, parent: str, module: nn.Module, first: dict[int, str], seen: set[int]) -> Node | None:
    while inner := next((child for key, child in module.named_children() if key in WRAPPED), None):
        module = inner
    if id(module) in seen:
        return None
    seen.add(id(module))

    whole = isinstance(module, nn.MultiheadAttention)
    own = []
    for key, parameter in module.named_parameters(recurse=True):
        inside = canonical(join(name, key))
        direct = "." not in key or key.startswith("parametrizations.")
        if (whole or direct) and first.get(id(parameter)) == inside:
            own.append(inside)
    if not own and isinstance(module, NormBase) and module.running_mean is not None:
        own = [join(name, "running_mean")]
    node = Node(name, parent, module, tuple(own), has_norm=is_norm(module))
    if not whole:
        children = ((key, child) for key, child in module.named_children() if key != "parametrizations")
        found = (_node(join(name, key), name, child, first, seen) for key, child in children)
        node.children = [child for child in found if child]
    if node.children:
        node.weights = sum(child.weights for child in node.children)
        node.has_norm = any(child.has_norm for child in node.children)
    elif isinstance(module, nn.RNNBase):
        node.weights = module.num_layers
    else:
        node.weights = int(_bears_weight(module))
    return node if node.own or node.children else None


def _bears_weight(leaf: nn.Module) -> bool:
    if is_norm(leaf):
        return False
    # Elsewhere a leading 1 is the batch axis: a learned position or token is no layer.
    stock = isinstance(leaf, nn.Linear | ConvBase)
    return any(p.ndim >= 2 and (p.shape[0] > 1 or p.ndim == 2 or stock) for p in leaf.parameters())


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _is_exact_list(node: Node) -> bool:
    return type(node.module) in _LISTS


def _is_chain(node: Node) -> bool:
    """Whether it is a list of blocks of one class, or of more plain weights than a block has."""
    blocks = Counter(
        type(child.module)
        for child in node.children
        if child.children and child.weights > 1 and child.has_norm and not _is_exact_list(child)
    )
    most = max(blocks.values(), default=0)
    if not isinstance(node.module, _LISTS):
        # Attributes b1, b2, b3 and nothing else are a list too; two may be halves of a block.
        return most > 2 and most == len(node.children)
    plain = sum(child.weights == 1 for child in node.children)
    return most > 1 or (type(node.module) is nn.Sequential and plain > _BRACKET_WEIGHTS)


def _chained(node: Node) -> int:
    """How many weight-bearing leaves lie in chains of blocks."""
    return node.weights if _is_chain(node) else sum(_chained(child) for child in node.children)


def units(root: Node) -> list[Unit]:
    """The units in registration order; together they hold every parameter once.

    Args:
        root: The tree of the model. It is opened, unless it is a leaf.
    """
    if not root.children:
        return list(_leaf(root))
    composites = [node for node in _walk(root) if node is not root and node.children and not _is_exact_list(node)]
    counts = Counter(type(node.module) for node in composites)
    repeated = {kind for kind, count in counts.items() if count > 1}
    stages = {type(node.module) for node in composites if 2 * _chained(node) >= node.weights}
    return list(_open(root, repeated - stages))


def _open(node: Node, blocks: set[type]) -> Iterator[Unit]:
    for name in node.own:
        yield Unit(name, node.name, "extra", (name,), ())
    kept = _kept(node, blocks)
    for child in node.children:
        if not child.children:
            yield from _leaf(child)
        elif child.weights == 1:
            yield _whole(child, "weight")
        elif child in kept:
            yield _whole(child, "block")
        else:
            yield from _open(child, blocks)


def _kept(node: Node, blocks: set[type]) -> set[Node]:
    """The children that are blocks."""
    kept = {child for child in node.children if _is_block(child, blocks)}
    if _is_exact_list(node):
        brackets = {child for child in node.children if _is_bracket(child, blocks)}
        kept |= brackets if len(brackets) >= _BRACKETS else set()
        # The root is no list of blocks: nn.Sequential(backbone, head).
        alone = len(set(node.module.children())) == 1 and not isinstance(node.module, nn.ModuleDict)
        if node.name and (kept or alone):
            kept |= {child for child in node.children if not _is_exact_list(child) and not _chained(child)}
    return kept


def _is_block(node: Node, blocks: set[type]) -> bool:
    return isinstance(node.module, _BLOCKS) or type(node.module) in blocks


def _is_bracket(node: Node, blocks: set[type]) -> bool:
    """A few plain weights, or parts of different classes such as an attention and its feed-forward."""
    if not _is_exact_list(node) or len(node.children) < 2 or not node.weights:
        return False
    parts = [child for child in node.children if child.children]
    return (
        sum(child.weights for child in node.children if not child.children) <= _BRACKET_WEIGHTS
        and len({type(part.module) for part in parts}) == len(parts)
        and all(part.weights <= 1 or _is_block(part, blocks) for part in parts)
    )


def _whole(node: Node, kind: Literal["weight", "block", "extra"]) -> Unit:
    name = node.name or type(node.module).__name__
    return Unit(name, node.parent, kind, node.tensors, (node.name,))


def _leaf(node: Node) -> Iterator[Unit]:
    if isinstance(node.module, nn.RNNBase) and node.module.num_layers > 1:
        levels: dict[int, list[str]] = {}
        for name in node.own:
            found = re.search(r"_l(\d+)(_reverse)?(\.|$)", name)
            # What no level owns acts on the last one's outputs: an amplitude, say.
            levels.setdefault(int(found[1]) if found else node.module.num_layers - 1, []).append(name)
        stem = node.name or type(node.module).__name__
        for level, names in sorted(levels.items()):
            yield Unit(join(stem, str(level)), node.parent, "weight", tuple(names), (node.name,))
    elif isinstance(node.module, nn.Embedding | nn.EmbeddingBag):
        yield Unit(node.name or "Embedding", node.parent, "weight", node.own, (node.name,), embedding=True)
    else:
        alone = getattr(node.module, "complete", False)
        yield _whole(node, "block" if alone else "weight" if node.weights else "extra")
