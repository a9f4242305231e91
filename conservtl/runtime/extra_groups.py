"""Groups of an optimizer for parameters outside the model: a head in the loss, a temperature."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError

__all__ = ["add_extra_groups"]


def add_extra_groups(optimizer: torch.optim.Optimizer, extra: Any, model: Collection[Tensor], scale: float) -> None:
    """Add groups for parameters outside the model, at the optimizer's own rate unless a group has one.

    Args:
        optimizer: takes the groups behind those of the plan.
        extra: a module, a parameter, parameters, pairs (name, parameter), or groups as torch takes them.
        model: the model's parameters, which are none of these.
        scale: the current phase's factor on the rates.

    Raises:
        SpecError: nothing is to be trained, or a parameter is the model's or no tensor.
    """
    known = set(map(id, model))
    mapped = isinstance(extra, Mapping)
    given = [extra] if mapped or isinstance(extra, (nn.Module, Tensor)) else list(_listed(extra))
    groups = (
        [dict(one) for one in given]
        if given and isinstance(given[0], Mapping)
        else [{"params": extra if isinstance(extra, (nn.Module, Tensor)) else given}]
    )
    for number, group in enumerate(groups):
        title = group.get("name", "extra" if len(groups) == 1 else f"extra {number}")
        named = [(f"{title}.{name}", one) for name, one in _named(group["params"]) if one.requires_grad]
        if twice := [name for name, one in named if id(one) in known]:
            raise SpecError(f"extra: {twice[0]!r} is a parameter of the model, whose group is there. Leave it out.")
        if not named:
            raise SpecError("extra must hold parameters that ask for a gradient; received none. Leave it out.")
        known.update(id(one) for _, one in named)
        lr = float(group.get("lr", optimizer.defaults["lr"])) * scale
        rates = {"lr": lr, "initial_lr": lr, "phase_scale": scale}
        optimizer.add_param_group({**group, "params": named, "name": title, **rates})


def _named(params: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters with names."""
    if isinstance(params, nn.Module):
        yield from params.named_parameters()
        return
    for number, one in enumerate([params] if isinstance(params, Tensor) else _listed(params)):
        name, parameter = one if isinstance(one, tuple) and len(one) == 2 else (str(number), one)
        if isinstance(parameter, nn.Module):
            yield from ((f"{name}.{inner}", each) for inner, each in parameter.named_parameters())
        elif isinstance(parameter, Tensor):
            yield name, parameter
        else:
            raise SpecError(
                f"extra must be a module, parameters or groups of them; received {type(parameter).__name__}. Pass the "
                "module that holds them."
            )


def _listed(params: Any) -> Iterable[Any]:
    if not isinstance(params, Iterable):
        raise SpecError(f"extra must be a module, parameters or groups of them; received {type(params).__name__}.")
    return params
