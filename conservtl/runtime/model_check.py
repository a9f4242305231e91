"""Whether a model is still the one that a plan was drawn up for, whatever wrapped or changed it since."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError
from conservtl.kernels.dtensor import sharded
from conservtl.layers import named_parameters, unwrap
from conservtl.layers.names import own_parameters
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.update import Update
from conservtl.runtime.freezing import parameter_owners, tracks_statistics

__all__ = ["ModelRecord", "check_conversion", "check_members", "check_precision", "checked_parameters"]

_HALF = (torch.float16, torch.bfloat16, torch.complex32)
_REMEDY = "Call adapt again on the model as it is now, or change it before adapt."


def checked_parameters(plan: Plan, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name, after a check that they are those of the plan.

    Wrapping (DDP, FSDP2, ``torch.compile``), moving and sharding keep names and shapes; adapters and other heads do
    not.
    """
    parameters = named_parameters(model)
    gone = [row.name for row in plan.rows if row.name not in parameters]
    new = [name for name in parameters if name not in plan] if gone or len(parameters) != len(plan.rows) else []
    if gone or new:
        changes = [f"{gone[0]!r} is gone" if gone else "", f"{new[0]!r} is new" if new else ""]
        raise SpecError(
            f"the model has changed since adapt: {' and '.join(filter(None, changes))} "
            f"(parameters gone: {len(gone)}, new: {len(new)}). {_REMEDY}"
        )
    for row in plan.rows:
        if (shape := tuple(parameters[row.name].shape)) != row.shape:
            raise SpecError(
                f"the model has changed since adapt: {row.name!r} has shape {shape}, and had {row.shape}. {_REMEDY}"
            )
    return parameters


def check_members(members: Iterable[tuple[str, Tensor]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless an optimizer's parameters are those of the model."""
    for name, member in members:
        if name in parameters and parameters[name] is not member:
            raise SpecError(
                f"the optimizer steps another {name!r} than the model has: it was replaced after "
                "adaptation.optimizer(...). Make the optimizer after the model is complete, wrapped and sharded."
            )


def check_precision(acting: Update | Penalty, name: str, parameter: Tensor) -> None:
    """Raise if a parameter is held in half precision, in which what acts on it is lost."""
    if parameter.dtype not in _HALF:
        return
    if isinstance(acting, Penalty):
        what = f"{name!r} is {parameter.dtype}: steps as small as a pull's are lost in its rounding."
    else:
        which = f"{acting.by} acts on {name!r}, which is {parameter.dtype}"
        what = f"{which}: steps as small as its are lost in that rounding."
    raise SpecError(f"{what} Keep parameters in float32 and use autocast for speed.")


def check_conversion(names: Iterable[str], before: Iterable[torch.dtype], now: Iterable[torch.dtype]) -> None:
    """Raise if a parameter was converted to half precision after the optimizer was made."""
    for name, made, found in zip(names, before, now, strict=False):
        if found != made and found in _HALF:
            raise SpecError(
                f"{name!r} is {found}, and was {made} when the optimizer was made: small steps are lost in that "
                "rounding. Keep parameters in float32 and use autocast for speed; convert the model after training."
            )


class ModelRecord:
    """The modules and parameters of a model at one moment, by weak references, to find out what was replaced."""

    def __init__(self, model: nn.Module) -> None:
        owners = parameter_owners(model)
        self._owners = {name: weakref.ref(module) for name, (module, _) in owners.items()}
        self._parameters = {name: weakref.ref(own_parameters(module)[key]) for name, (module, key) in owners.items()}
        self._norms = [weakref.ref(module) for module in unwrap(model).modules() if tracks_statistics(module)]

    def check_copied(self, plan: Plan, model: nn.Module, start: Mapping[str, Tensor]) -> None:
        """Raise if a module that holds values from the source was replaced by one with other values."""
        for name, (module, key) in parameter_owners(model).items():
            parameter = own_parameters(module)[key]
            same = self._owners[name]() is module or self._parameters[name]() is parameter
            if same or plan[name].origin != "source" or sharded(parameter):
                continue
            if name not in start or not torch.equal(parameter.detach().cpu(), start[name].to(parameter.dtype)):
                raise SpecError(
                    f"the model has changed since adapt: {name!r}, which came from the source, is in another module "
                    f"now, with other values. {_REMEDY}"
                )

    def moved(self, model: nn.Module) -> list[str]:
        """Return the parameters that another module holds now, as after ``convert_sync_batchnorm``."""
        return [
            name
            for name, (module, key) in parameter_owners(model).items()
            if name in self._owners
            and self._owners[name]() is not module
            and self._parameters[name]() is own_parameters(module)[key]
        ]

    def check_norms(self, model: nn.Module, by: Collection[str]) -> None:
        """Raise if a norm was replaced although the plan does something to it, such as hold its statistics (``by``)."""
        norms = [module for module in unwrap(model).modules() if tracks_statistics(module)]
        replaced = len(norms) != len(self._norms) or any(
            old() is not new for old, new in zip(self._norms, norms, strict=False)
        )
        if by and replaced:
            raise SpecError(
                f"a norm of the model was replaced after adaptation.optimizer(...), as by convert_sync_batchnorm, and "
                f"with it what the plan does to it ({', '.join(by)}). Convert norms before adaptation.optimizer(...)."
            )
