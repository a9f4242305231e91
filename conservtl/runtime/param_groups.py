"""From the plan to an optimizer's parameter groups: real rates, every trained parameter in exactly one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from conservtl.errors import SpecError
from conservtl.kernels.dtensor import by_rows, sharded
from conservtl.plan.after import After
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.update import Update

__all__ = ["build_optimizer"]

_HALF = (torch.float16, torch.bfloat16)


def build_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    scale: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make an optimizer whose groups carry the plan's rates, and the phase's factor that is in them.

    Args:
        cls: an optimizer class that takes groups and dense gradients.
        plan: rates and coverage.
        parameters: parameter name -> tensor, as the model holds them now.
        scale: the current phase's factor on all rates.
        options: keyword arguments for ``cls``.

    Raises:
        SpecError: nothing is trained, the optimizer cannot take groups, weight decay is asked for on
            parameters that alpha or beta covers, a pulled parameter is in half precision, or a
            decoupled pull would overshoot.
    """
    rows = [plan[name] for name in plan.trained]
    if not rows:
        raise SpecError("the plan freezes every parameter, so there is nothing to optimize. Freeze fewer layers.")
    if not callable(cls):
        raise SpecError(
            f"optimizer() makes the optimizer: pass the class and its arguments, such as optimizer(torch.optim.AdamW, "
            f"lr=1e-3); received an instance of {type(cls).__name__}."
        )
    name = getattr(cls, "__name__", str(cls))
    known = inspect.signature(cls).parameters
    defaults = {key: parameter.default for key, parameter in known.items()} | dict(options)
    _check_class(cls, name, rows)
    _check_decay(name, plan, {**getattr(cls, "keywords", {}), **options})
    base = defaults.get("lr", inspect.Parameter.empty)
    if base is inspect.Parameter.empty or base is None:
        raise SpecError(f"{name}: the rates are multiples of its lr, but none was given. Pass lr=...")
    most = max(phase.scale for phase in plan.phases)
    for row in rows:
        _check_row(plan, row, parameters[row.name], row.rate(float(base)) * most)
    acting: tuple[Update | After | Penalty, ...] = (*plan.updates, *plan.after, *plan.penalties)
    for one in acting:
        _check_shards(one, parameters)
    for update in plan.updates:
        _check_update(update, parameters)
    layered = {name for update in plan.updates if update.layered for name in update.names}
    groups: dict[tuple[float, bool, str | None], list[tuple[str, nn.Parameter]]] = {}
    for row in rows:
        bare = row.name in plan.covered or not row.weight_decay
        key = (row.rate(float(base)) * scale, bare, row.layer if row.name in layered else None)
        groups.setdefault(key, []).append((row.name, parameters[row.name]))
    listed = [
        {"params": members, "lr": lr, "initial_lr": lr, "phase_scale": scale, **({"layer": layer} if layer else {})}
        for (lr, _, layer), members in groups.items()
    ]
    optimizer = cls(listed, **options)
    for group, (_, bare, _) in zip(optimizer.param_groups, groups, strict=True):
        if bare and "weight_decay" in group:  # its default may stand anywhere, so it is mended where it ends up
            group["weight_decay"] = 0.0
    return optimizer


def _check_class(cls: Callable[..., torch.optim.Optimizer], name: str, rows: list[Row]) -> None:
    kind = getattr(cls, "func", cls)
    if kind is torch.optim.LBFGS:
        raise SpecError(
            f"{name} takes no parameter groups, so it cannot give layers their own rates. Use AdamW or SGD."
        )
    if kind is torch.optim.SparseAdam:
        raise SpecError(f"{name} takes sparse gradients only, and a pull is dense. Use AdamW or SGD.")
    if kind is getattr(torch.optim, "Muon", None):
        other = [row for row in rows if len(row.shape) != 2]
        if other:
            raise SpecError(
                f"{name} takes matrices only, but {other[0].name!r} has shape {other[0].shape}. "
                "Use AdamW or SGD, or freeze what is not a matrix."
            )


def _check_decay(name: str, plan: Plan, options: Mapping[str, Any]) -> None:
    covered = [row for row in plan.trained if row in plan.covered]
    if covered and float(options.get("weight_decay", 0.0)) != 0.0:
        by = plan.covered[covered[0]]
        raise SpecError(
            f"{name}: weight_decay={options['weight_decay']:g} pulls to zero {len(covered)} parameters that "
            f"{by} already pulls ({covered[0]!r}, …). Leave weight_decay out, or leave {by} out."
        )


def _check_shards(one: Update | After | Penalty, parameters: Mapping[str, nn.Parameter]) -> None:
    if isinstance(one, Penalty):
        whole, parts = one.sums_over in ("all", "parameters"), one.sums_over == "elements"
    else:
        whole, parts = not type(one).shards, False
    for name in getattr(one, "names", ()):
        if sharded(parameters[name]) and whole:
            raise SpecError(
                f"{one.by} acts on whole tensors, but {name!r} is sharded over processes. Train with DDP instead of "
                f"FSDP, or leave {one.by} out."
            )
        if sharded(parameters[name]) and not parts and not by_rows(parameters[name]):
            raise SpecError(
                f"{one.by} takes parameters that are sharded along their first dimension, but {name!r} is cut "
                f"otherwise: {parameters[name].placements}. Shard it by rows, or leave {one.by} out."  # type: ignore[attr-defined]
            )


def _check_update(update: Update, parameters: Mapping[str, nn.Parameter]) -> None:
    for name in update.names:
        if parameters[name].dtype in _HALF:
            raise SpecError(
                f"{update.by} acts on {name!r}, which is {parameters[name].dtype}: steps as small as its are lost in "
                "that rounding. Keep parameters in float32 and use autocast for speed."
            )


def _check_row(plan: Plan, row: Row, parameter: nn.Parameter, rate: float) -> None:
    for column in ("pull", "decay"):
        if getattr(row, column) is not None and not any(
            one.column == column and row.name in one.names for one in plan.penalties
        ):
            raise SpecError(
                f"{row.chosen[column].by} gives {row.name!r} a {column} of {getattr(row, column):g}, but no penalty "
                f"of the plan acts on it. Add one whose column is {column!r} with plan.with_penalty(...)."
            )
    if row.name not in plan.covered:
        return
    if parameter.dtype in _HALF:
        raise SpecError(
            f"{row.name!r} is {parameter.dtype}: steps as small as a pull's are lost in its rounding. Keep "
            "parameters in float32 and use autocast for speed."
        )
    step = rate * plan.strength_of(row.name, "decoupled")
    if step > 1:
        raise SpecError(
            f"{row.name!r}: a decoupled pull of rate × strength = {step:g} overshoots the source (1 reaches it "
            "in one step). Lower alpha, beta or the rate."
        )
