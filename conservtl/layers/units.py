"""Division of a model into units: the layers, and the extras (norms, scales, tokens) that join a layer.

The module tree is traversed from the root. A module is one unit if it is one of these, and is divided otherwise:

- a weight: a module with a single leaf that has a weight (a convolution with its norm, a pooling head), of any class;
  an adapter of PEFT belongs to the weight that it changes;
- a block: a module whose class occurs at least twice (residual and transformer blocks);
- a bracket: one of at least three `nn.Sequential(conv, relu, conv, relu)` in one list;
- a neighbour of blocks in a list, the only element of a list, or a module between two blocks of one module, even if its
  class occurs once.

A class that occurs twice is a stage or a tower, and is divided, if chains of blocks contain at least half of its leaves
with weights. The blocks of a chain have one name but for the number, unlike `window_attention` and `grid_attention`;
parallel branches of plain weights are no chain. Any other class that occurs once is divided too, so that a wrapper or a
backbone does not become one layer. A list of experts or attention heads is not a chain: they have no norm, and a block
has one. Modules without a weight (scales, tables of positions, a norm with its activation) are extras.
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

__all__ = ["Node", "Unit", "is_adapted", "is_norm", "join", "tree", "units"]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_BRACKET_WEIGHTS = 3
"""Weights in a bracket at most: a longer chain of plain weights is a network (VGG)."""
_NUMBER = re.compile(r"\d+")
_POSITIONS = re.compile(r"(?<!com)position|pos_?e(mb|nc)", re.IGNORECASE)
_BRACKETS = 3
"""Brackets in a list at least: two are more often features and classifier."""


@dataclass(frozen=True)
class Unit:
    """A layer, or an extra that joins a layer.

    Extras join a `weight` (a convolution, a linear map) rather than a `block`, which is complete.
    """

    name: str
    parent: str
    kind: Literal["weight", "block", "extra"]
    tensors: tuple[str, ...]
    modules: tuple[str, ...]
    embedding: bool = False


@dataclass(eq=False)
class Node:
    """A module with parameters or running statistics, under the names of first registration."""

    name: str
    parent: str
    module: nn.Module
    direct: tuple[str, ...]
    """Names of its parameters, or of the running mean for a batch norm without parameters."""
    children: list[Node] = field(default_factory=list)
    weights: int = 0
    """Number of leaves with weights in its subtree."""
    has_norm: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors in its subtree."""
        return self.direct + tuple(name for child in self.children for name in child.tensors)


def join(*parts: str) -> str:
    """Return the dotted name of the parts, without the empty name of the root."""
    return ".".join(part for part in parts if part)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation: by its class, or by its name if its parameters have one axis."""
    if isinstance(module, _NORMS):
        return True
    named_norm = "norm" in type(module).__name__.lower()
    return named_norm and all(sum(size > 1 for size in p.shape) <= 1 for p in module.parameters())


def tree(model: nn.Module, first: dict[int, str]) -> Node | None:
    """Return the module tree of an unwrapped model.

    ``first``: id of a parameter -> its canonical name; further names of a tied parameter are skipped.
    """
    return _node("", "", model, first, set())


def _node(name: str, parent: str, module: nn.Module, first: dict[int, str], seen: set[int]) -> Node | None:
    while inner := next((child for key, child in module.named_children() if key in WRAPPED), None):
        module = inner
    if id(module) in seen:
        return None
    seen.add(id(module))

    whole = isinstance(module, nn.MultiheadAttention) or is_adapted(module)
    tensors = []
    for key, parameter in module.named_parameters(recurse=True):
        inside = canonical(join(name, key))
        direct = "." not in key or key.startswith("parametrizations.")
        if (whole or direct) and first.get(id(parameter)) == inside:
            tensors.append(inside)
    if not tensors and isinstance(module, NormBase) and module.running_mean is not None:
        tensors = [join(name, "running_mean")]
    node = Node(name, parent, module, tuple(tensors), has_norm=is_norm(module))
    if not whole:
        children = ((key, child) for key, child in module.named_children() if key != "parametrizations")
        nodes = (_node(join(name, key), name, child, first, seen) for key, child in children)
        node.children = [child for child in nodes if child]
    if node.children:
        node.weights = sum(child.weights for child in node.children)
        frozen = any(is_norm(child) for child in module.children())  # a frozen batch norm has buffers alone
        node.has_norm = frozen or any(child.has_norm for child in node.children)
    elif isinstance(module, nn.RNNBase):
        node.weights = module.num_layers
    else:
        node.weights = int(_has_weight(module))
    return node if node.direct or node.children else None


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a weight with an adapter of PEFT beside it, or with a copy that is trained instead."""
    children = {name for name, _ in module.named_children()}
    return "base_layer" in children or {"original_module", "modules_to_save"} <= children


def _has_weight(leaf: nn.Module) -> bool:
    if is_norm(leaf):
        return False
    if _POSITIONS.search(type(leaf).__name__) and not isinstance(leaf, nn.Linear | ConvBase | nn.Embedding):
        return False  # a table of positions that is added
    # In other modules a leading 1 is the batch axis: a learned position or token is not a layer.
    is_map = isinstance(leaf, nn.Linear | ConvBase)
    return any(p.ndim >= 2 and (p.shape[0] > 1 or p.ndim == 2 or is_map) for p in leaf.parameters())


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _is_exact_list(node: Node) -> bool:
    return type(node.module) in _LISTS


def _is_chain(node: Node) -> bool:
    """Return whether a module is a list of blocks of one class, or of more plain weights than a block has."""
    blocks = Counter(
        (_parts(child), _NUMBER.sub("", child.name.rpartition(".")[2]))
        for child in node.children
        if child.children and child.weights > 1 and child.has_norm and (not _is_exact_list(child) or _is_pair(child))
    )
    most = max(blocks.values(), default=0)
    if not isinstance(node.module, _LISTS):
        # A module with the attributes b1, b2, b3 only is a list too; with two, they may be the halves of a block.
        return most > 2 and most == len(node.children)
    plain = sum(child.weights == 1 for child in node.children)
    return most > 1 or (type(node.module) is nn.Sequential and plain > _BRACKET_WEIGHTS)


def _parts(node: Node) -> tuple[type, ...]:
    """Return the class of a module, or the classes in a list."""
    return tuple(type(child.module) for child in node.children) if _is_exact_list(node) else (type(node.module),)


def _is_pair(node: Node) -> bool:
    """Return whether a list holds two or more modules of several weights, each of another class."""
    parts = _parts(node)
    return 1 < len(parts) == len({*parts}) and all(one.weights > 1 and not _is_exact_list(one) for one in node.children)


def _chained(node: Node) -> int:
    """Return the number of leaves with weights in chains of blocks."""
    if _is_chain(node):
        return node.weights
    return sum(_chained(child) for child in node.children if not (_is_plain(child) and _is_parallel(node)))


def _is_plain(node: Node) -> bool:
    """Return whether a module is a list of weights, each with a norm and activation or without."""
    return _is_exact_list(node) and all(child.weights == 1 for child in node.children)


def _is_parallel(node: Node) -> bool:
    """Return whether a module has branches side by side: they take the same channels, and no other's output."""
    ends = [_ends(child) for child in node.children if child.weights]
    takes = {end[0] for end in ends if end}
    return len(ends) > 1 and None not in ends and len(takes) == 1 and takes.isdisjoint(end[1] for end in ends if end)


def _ends(node: Node) -> tuple[int, int] | None:
    """Return the channels that a module's first map takes and its last one gives."""
    maps = [one.module for one in _walk(node) if isinstance(one.module, nn.Linear | ConvBase)]
    weights = [module.weight.shape for module in maps if isinstance(module.weight, nn.Parameter)]
    return (weights[0][1], weights[-1][0]) if weights else None


def units(root: Node) -> list[Unit]:
    """Return the units in registration order; together they contain every parameter once."""
    if not root.children:
        return list(_leaf(root))
    composites = [node for node in _walk(root) if node is not root and node.children and not _is_exact_list(node)]
    counts = Counter(type(node.module) for node in composites)
    repeated = {kind for kind, count in counts.items() if count > 1}
    stages = {type(node.module) for node in composites if node.weights and 2 * _chained(node) >= node.weights}
    return list(_divide(root, repeated - stages))


def _divide(node: Node, blocks: set[type]) -> Iterator[Unit]:
    for name in node.direct:
        yield Unit(name, node.name, "extra", (name,), ())
    whole = _blocks_of(node, blocks)
    for child in node.children:
        if not child.children:
            yield from _leaf(child)
        elif child.weights <= 1:
            yield _whole(child, "weight" if child.weights else "extra")
        elif child in whole:
            yield _whole(child, "block")
        else:
            yield from _divide(child, blocks)


def _blocks_of(node: Node, blocks: set[type]) -> set[Node]:
    """Return the children that are blocks."""
    chosen = {child for child in node.children if _is_block(child, blocks)}
    if _is_exact_list(node):
        brackets = {child for child in node.children if _is_bracket(child, blocks)}
        chosen |= brackets if len(brackets) >= _BRACKETS else set()
        # The root is not a list of blocks: nn.Sequential(backbone, head).
        alone = len(set(node.module.children())) == 1 and not isinstance(node.module, nn.ModuleDict)
        if node.name and (chosen or alone):
            chosen |= {child for child in node.children if not _is_exact_list(child) and not _chained(child)}
    elif not isinstance(node.module, _LISTS):
        places = [index for index, child in enumerate(node.children) if child in chosen and child.weights > 1]
        between = node.children[places[0] : places[-1]] if places else []
        chosen |= {child for child in between if not _is_exact_list(child) and not _holds_block(child, blocks)}
    return chosen


def _holds_block(node: Node, blocks: set[type]) -> bool:
    inner = (one for child in node.children for one in _walk(child))
    return bool(_chained(node)) or any(one.weights > 1 and one.children and _is_block(one, blocks) for one in inner)


def _is_block(node: Node, blocks: set[type]) -> bool:
    return isinstance(node.module, _BLOCKS) or type(node.module) in blocks


def _is_bracket(node: Node, blocks: set[type]) -> bool:
    """Return whether a list has few plain weights, or parts of different classes (an attention, a feed-forward)."""
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
        for name in node.direct:
            level_of = re.search(r"_l(\d+)(_reverse)?(\.|$)", name)
            # A parameter of no level acts on the last level's outputs: an amplitude.
            levels.setdefault(int(level_of[1]) if level_of else node.module.num_layers - 1, []).append(name)
        stem = node.name or type(node.module).__name__
        for level, names in sorted(levels.items()):
            yield Unit(join(stem, str(level)), node.parent, "weight", tuple(names), (node.name,))
    elif isinstance(getattr(node.module, "base_layer", node.module), nn.Embedding | nn.EmbeddingBag):
        yield Unit(node.name or "Embedding", node.parent, "weight", node.direct, (node.name,), embedding=True)
    else:
        complete = getattr(node.module, "complete", False)
        yield _whole(node, "block" if complete else "weight" if node.weights else "extra")
