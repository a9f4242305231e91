"""Parameter names without the prefixes of wrappers, and their selection by globs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from conservtl.errors import SelectorError, hint

__all__ = [
    "WRAPPED",
    "canonical",
    "check_globs",
    "glob_hint",
    "holder_counts",
    "matches",
    "named_modules",
    "named_parameters",
    "own_parameters",
    "owner",
    "select",
    "unwrap",
]

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes in which torch.compile, activation checkpointing and FSDP store the wrapped module."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside wrappers, in any nesting.

    Wrappers are DistributedDataParallel, DataParallel, torch.compile, and models of averaged weights: torch's
    AveragedModel, and classes that name themselves EMA (timm's ModelEmaV3) and hold the model as ``module`` or
    ``ema_model``.
    """
    while True:
        children = dict(model.named_children())
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := children.get("_orig_mod"), nn.Module):
            model = inner
        elif _AVERAGED.search(type(model).__name__) and not own_parameters(model) and children.keys() & _AVERAGE:
            model = children["ema_model"] if "ema_model" in children else children["module"]
        else:
            return model


_AVERAGED = re.compile(r"^AveragedModel$|(^|[a-z_])(EMA|Ema)(?![a-z])")
_AVERAGE = {"module", "ema_model"}


def canonical(name: str) -> str:
    """Return the name without the components that torch.compile, checkpointing and FSDP insert.

    A leading `module.` stays, because a model may have an attribute of that name; use `unwrap` to remove the wrapper.

    Examples:
        >>> canonical("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return canonical name -> parameter of a model, wrapped or not, in registration order; a tied one once."""
    return {canonical(name): parameter for name, parameter in unwrap(model).named_parameters()}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return canonical name -> module of a model, wrapped or not; a shared one under each of its names."""
    return {canonical(name): module for name, module in unwrap(model).named_modules(remove_duplicate=False)}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module holds itself, without its children's; a tied one under each name."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def holder_counts(model: nn.Module) -> Counter[int]:
    """Return id of a parameter -> how many modules hold it; more than 1 for a tied parameter."""
    return Counter(id(parameter) for module in model.modules() for parameter in own_parameters(module).values())


def matches(pattern: str, name: str) -> bool:
    """Return whether the glob matches the name, or a module that contains it.

    Args:
        pattern: A glob, case-sensitive; `*` crosses dots.
        name: The canonical name of a parameter, a module or a layer.

    Examples:
        >>> matches("layer1", "layer1.0.weight"), matches("layer1", "layer10.weight")
        (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def owner(name: str) -> str:
    """Return the module that holds a parameter or buffer, parametrised or not."""
    return name.rpartition(".parametrizations.")[0] or name.rpartition(".")[0]


def check_globs(name: str, value: Any, *, text: bool = False) -> None:
    """Raise unless an argument is a list of globs, a dictionary by globs, or None.

    Args:
        name: Of the argument.
        value: As received.
        text: Whether one glob may be given alone.

    Raises:
        SelectorError: It is something else.
    """
    if isinstance(value, str) and not text:
        raise SelectorError(f"{name} must be a list of globs; received the text {value!r}. Write {name}=[{value!r}].")
    if value is not None and not (isinstance(value, Iterable) and all(isinstance(glob, str) for glob in value)):
        raise SelectorError(f"{name} must be a list of globs, all texts; received {value!r:.60}. Write {name}=['...'].")


def select(
    patterns: Sequence[str],
    names: Sequence[str],
    what: str = "parameter",
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return pattern -> the names it matches, in the order of `names`.

    A tied parameter is found under its aliases too: by a pattern that is an alias or the module that holds it, and by
    one that matches no name at all. A wider pattern, such as `decoder`, leaves it to the part that comes first.

    Args:
        patterns: Globs as in `matches`.
        names: The names to select from.
        what: The kind of the names, for the error message.
        aliases: Name -> other names of the same parameter.

    Raises:
        SelectorError: A pattern matches nothing.
    """
    chosen = {}
    for pattern in patterns:
        direct = {name for name in names if matches(pattern, name)}
        tied = {
            name
            for name in names
            for alias in (aliases or {}).get(name, ())
            if pattern in (alias, owner(alias)) or (not direct and matches(pattern, alias))
        }
        chosen[pattern] = tuple(name for name in names if name in direct or name in tied)
    for pattern, matched in chosen.items():
        if not matched:
            others = [alias for tied in (aliases or {}).values() for alias in tied]
            similar = glob_hint(pattern, [*names, *others])
            raise SelectorError(f"{pattern!r}: must match at least one {what}, matches none of {len(names)}.{similar}")
    return chosen


def glob_hint(pattern: str, names: Iterable[str]) -> str:
    """Return a sentence with the names, or the modules that contain them, most like a glob that matches nothing.

    Examples:
        >>> glob_hint("layr2.*", ["layer1.0.weight", "layer2.0.weight"])
        " Did you mean 'layer2' or 'layer2.0' or 'layer1'?"
    """
    parts = [name.split(".") for name in names]
    candidates = dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1))
    return hint(pattern.strip("*."), list(candidates), count=3) or " There are none."
