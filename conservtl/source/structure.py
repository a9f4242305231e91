"""Check that a model is built as the source model was."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from conservtl.compat import BatchNormBase
from conservtl.errors import SourceError
from conservtl.layers import canonical, matches, unwrap
from conservtl.layers.extended import extended_modules
from conservtl.layers.units import is_norm
from conservtl.plan.plan import Plan

__all__ = ["check_extensions", "check_structure"]

_STRUCTURE = ("stride", "dilation", "groups", "num_groups", "num_heads", "transposed")


def check_structure(model: nn.Module, source: nn.Module, allow: Sequence[str] = ()) -> None:
    """Hold the model to the structure the source's weights were learned in.

    Weights of the right shape mean something else under another stride, dilation, number of groups
    or norm; a layer that is missing leaves those behind it with inputs they never saw.

    Args:
        model: the model to adapt.
        source: the source model.
        allow: globs of module names that may differ.

    Raises:
        SourceError: a layer with parameters, or a norm, is missing or differs; the message names it.
    """
    ours = {canonical(name): module for name, module in unwrap(model).named_modules(remove_duplicate=False)}
    for raw, theirs in unwrap(source).named_modules():
        name = canonical(raw)
        holds = bool(list(theirs.parameters(recurse=False))) or is_norm(theirs)
        if not holds or any(matches(glob, name) for glob in allow):
            continue
        if name not in ours:
            raise SourceError(
                f"the model has no layer {name!r}, which the source has ({type(theirs).__name__}). Keep it, "
                f"or allow the difference by name: allow=[{name!r}]."
            )
        if found := _difference(ours[name], theirs):
            raise SourceError(
                f"layer {name!r}: {found}. The source's weights were learned in another structure; build "
                f"the model as the source was, or allow the difference by name: allow=[{name!r}]."
            )


def check_extensions(plan: Plan, source: nn.Module) -> None:
    """Raise if modules of the source compute otherwise than their class does, and the plan does not say so.

    The source's weights would then be those of another model.

    Raises:
        SourceError: the plan has no such extension; the message names the strategy to add.
    """
    planned = {extension.kind for extension in plan.extensions}
    for module in extended_modules(source).values():
        if module.kind not in planned:
            raise SourceError(
                f"the source's {module.difference()}, and the plan's do not, so its weights would be another model's. "
                f"{module.remedy()}"
            )


def _difference(ours: nn.Module, theirs: nn.Module) -> str | None:
    if _family(ours) is not _family(theirs):
        return f"norm {type(ours).__name__} here, {type(theirs).__name__} in the source"
    if not is_norm(ours) and not list(ours.parameters()):
        return f"{type(ours).__name__} without parameters here, {type(theirs).__name__} in the source"
    for attribute in _STRUCTURE:
        a, b = getattr(ours, attribute, None), getattr(theirs, attribute, None)
        if a != b and a is not None and b is not None:
            return f"{attribute} {a} here, {b} in the source"
    return None


def _family(module: nn.Module) -> type | None:
    """The kind of norm; a synchronised batch norm computes what the plain one does."""
    if isinstance(module, BatchNormBase):
        return BatchNormBase
    return type(module) if is_norm(module) else None
