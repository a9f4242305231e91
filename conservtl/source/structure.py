"""Comparison of the model's structure with the source model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from conservtl.compat import BatchNormBase
from conservtl.errors import SourceError
from conservtl.layers import canonical, matches, unwrap
from conservtl.layers.extended import extended_modules
from conservtl.layers.names import named_modules, owner
from conservtl.layers.units import is_norm
from conservtl.plan.plan import Plan

__all__ = ["check_extensions", "check_structure"]

_STRUCTURE = ("stride", "dilation", "groups", "num_groups", "num_heads", "transposed")


def check_structure(
    model: nn.Module, source: nn.Module, allow: Sequence[str] = (), names: Mapping[str, str] | None = None
) -> None:
    """Raise unless the model has the structure in which the source's weights were learned.

    Weights of the same shape compute another function with another stride, dilation, number of groups or norm. A
    missing layer changes the inputs of all layers after it.

    Args:
        model: the model to adapt.
        source: the source model.
        allow: globs of module names that may differ.
        names: name of a tensor of the source -> name under which it is matched with the model's, if names were
            changed; modules of other tensors, which were left out or which the model's hooks turned into others, are
            not compared.
    """
    modules = named_modules(model)
    names = {} if names is None else names
    renamed = any(old != new for old, new in names.items())
    migrated = bool(names) and any(canonical(name) not in names for name, _ in unwrap(source).named_parameters())
    for raw, source_module in unwrap(source).named_modules():
        own = canonical(raw)
        name = _name_in_model(own, source_module, names, renamed) if renamed or migrated else own
        if name is None:
            continue
        compared = bool(list(source_module.parameters(recurse=False))) or is_norm(source_module)
        if not compared or any(matches(glob, name) for glob in allow):
            continue
        if name not in modules:
            raise SourceError(
                f"the model has no layer {name!r}, which the source has ({type(source_module).__name__}). Keep it, "
                f"or allow the difference by name: allow=[{name!r}]."
            )
        if difference := _difference(modules[name], source_module):
            raise SourceError(
                f"layer {name!r}: {difference}. The source's weights were learned in another structure. Build "
                f"the model like the source, or allow the difference by name: allow=[{name!r}]."
            )


def check_extensions(plan: Plan, source: nn.Module) -> None:
    """Raise unless the plan extends the modules that are extended in the source.

    Without the extension, the model computes another function with the source's weights.
    """
    planned = {extension.kind for extension in plan.extensions}
    for module in extended_modules(source).values():
        if module.kind not in planned:
            raise SourceError(
                f"the source's {module.difference()}, and the plan's do not, so its weights would be another model's. "
                f"{module.remedy()}"
            )


def _name_in_model(name: str, module: nn.Module, names: Mapping[str, str], renamed: bool) -> str | None:
    """Return the name of a source module in the model; None if its tensors were left out or went to several modules."""
    own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if not own and not renamed:
        return name
    tensors = [canonical(f"{name}.{key}" if name else key) for key in own]
    owners = {owner(names[tensor]) for tensor in tensors if tensor in names}
    return owners.pop() if len(owners) == 1 else None


def _difference(module: nn.Module, source: nn.Module) -> str | None:
    """Return the first structural difference, or None."""
    if _norm_type(module) is not _norm_type(source):
        return f"norm {type(module).__name__} here, {type(source).__name__} in the source"
    if not is_norm(module) and not list(module.parameters()):
        return f"{type(module).__name__} without parameters here, {type(source).__name__} in the source"
    for attribute in _STRUCTURE:
        here, there = getattr(module, attribute, None), getattr(source, attribute, None)
        if here != there and here is not None and there is not None:
            return f"{attribute} {here} here, {there} in the source"
    return None


def _norm_type(module: nn.Module) -> type | None:
    """Return the type of norm, None for other modules; all batch norms compute the same function.

    Frozen ones too, which timm and torchvision make of batch norms (``timm.utils.freeze``): in eval mode.
    """
    if isinstance(module, BatchNormBase) or type(module).__name__.startswith("FrozenBatchNorm"):
        return BatchNormBase
    if isinstance(module, nn.GroupNorm):  # a subclass may leave out padding
        return nn.GroupNorm
    return type(module) if is_norm(module) else None
