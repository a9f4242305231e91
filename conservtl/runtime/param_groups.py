"""From the plan to an optimizer's parameter groups: absolute rates, every trained parameter in exactly one group."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.bounds import is_number
from conservtl.errors import SpecError, counted
from conservtl.kernels.dtensor import by_rows, sharded
from conservtl.plan.decision import After
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.update import Update
from conservtl.runtime.inner_optimizer import check_groups, check_moves, check_steps, inner_optimizer
from conservtl.runtime.model_check import check_precision

__all__ = ["build_optimizer"]

_Group = tuple[float, bool, str | None]
"""Rate; whether weight decay is off; layer, None unless an update sets its rate."""


def build_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    scale: float,
    options: Mapping[str, Any],
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return an optimizer whose groups carry the plan's rates, times the phase's factor, and names of layers.

    It may be an optimizer around another, such as SAM or Lookahead.

    Returns:
        The optimizer, and the one inside it that moves the weights: itself, unless it wraps another.

    Raises:
        SpecError: nothing is trained, the optimizer cannot take groups or carry out the plan around another, weight
            decay is asked for on parameters that a penalty covers, a covered parameter is in half precision, a strength
            has no penalty, or a decoupled penalty would overshoot the source.
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
    _check_class(cls, name, rows)
    _check_weight_decay(name, plan, {**getattr(cls, "keywords", {}), **options})
    base = _base_rate(cls, name, options)
    largest = max(phase.scale for phase in plan.phases)
    for row in rows:
        _check_row(plan, row, parameters[row.name], row.rate(base) * largest)
    acting: tuple[Update | After | Penalty, ...] = (*plan.updates, *plan.after, *plan.penalties)
    for decision in acting:
        _check_shards(decision, parameters)
    for update in plan.updates:
        _check_precision(update, parameters)
    groups = _groups(plan, rows, base, scale, decays=_decays(cls, options))
    specs = _specs(plan, groups, parameters, scale)
    optimizer: Any = _made(cls, specs, options)
    inner = inner_optimizer(optimizer, name)
    rates: dict[Tensor, tuple[str, float]] = {
        parameters[row]: (row, lr) for (lr, *_), names in groups.items() for row in names
    }
    check_groups(optimizer, inner, rates, len(specs))
    check_moves(optimizer, plan, name)
    if inner is not optimizer:
        device = parameters[rows[0].name].device
        check_steps(lambda tensor: _made(cls, [specs[0] | {"params": [("weight", tensor)]}], options), name, device)
    for group, (_, bare, _) in zip(inner.param_groups, groups, strict=True):
        if bare and "weight_decay" in group:  # set afterwards, because its default may come from anywhere
            group["weight_decay"] = 0.0
    return optimizer, inner


def _made(
    cls: Callable[..., torch.optim.Optimizer], specs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimizer of groups with named parameters; without names if its class takes tensors only."""
    try:
        return cls([dict(spec) for spec in specs], **options)
    except Exception:
        with suppress(Exception):  # if names are not the cause, the first error is the one to see
            return cls([{**spec, "params": [one for _, one in spec["params"]]} for spec in specs], **options)
        raise


def _base_rate(cls: Callable[..., torch.optim.Optimizer], name: str, options: Mapping[str, Any]) -> float:
    """Return the rate that the plan's ratios multiply: given, or the class's default."""
    known = inspect.signature(cls).parameters
    base = options.get("lr", known["lr"].default if "lr" in known else inspect.Parameter.empty)
    if base is inspect.Parameter.empty or base is None:
        raise SpecError(f"{name}: the rates are multiples of its lr, but none was given. Pass lr=...")
    if not is_number(base) or not 0 <= float(base) < math.inf:
        raise SpecError(f"{name}: lr must be a finite number of at least 0; received {base!r:.60}. Give one.")
    return float(base)


def _decays(cls: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]) -> bool:
    """Return whether the optimizer has a weight decay of its own, as far as its arguments tell."""
    known = inspect.signature(cls).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    default = known["weight_decay"].default if "weight_decay" in known else None if open_ended else 0.0
    return bool(options.get("weight_decay", default) != 0)


def _groups(plan: Plan, rows: Sequence[Row], base: float, scale: float, *, decays: bool) -> dict[_Group, list[str]]:
    """Return the parameters of each group."""
    layered = {name for update in plan.updates if update.layered for name in update.names}
    covered = plan.covered
    groups: dict[_Group, list[str]] = {}
    for row in rows:
        # Biases and norms share the weights' groups if that makes no difference.
        bare = row.name in covered or (not row.weight_decay and (decays or "weight_decay" in row.chosen))
        key = (row.rate(base) * scale, bare, row.layer if row.name in layered else None)
        groups.setdefault(key, []).append(row.name)
    return groups


def _specs(
    plan: Plan,
    groups: Mapping[_Group, Sequence[str]],
    parameters: Mapping[str, nn.Parameter],
    scale: float,
) -> list[dict[str, Any]]:
    """Return the groups as an optimizer takes them."""
    return [
        {
            "params": [(name, parameters[name]) for name in names],
            "name": title,
            "lr": lr,
            "initial_lr": lr,
            "phase_scale": scale,
            **({"layer": layer} if layer else {}),
        }
        for title, ((lr, _, layer), names) in zip(_titles(plan, groups.values()), groups.items(), strict=True)
    ]


def _titles(plan: Plan, groups: Iterable[Sequence[str]]) -> list[str]:
    """Return a name for each group, for monitors of rates: its layers, and kinds of parameters if two share them."""
    members = [[plan[name] for name in names] for names in groups]
    titles = [_span([row.layer for row in rows]) for rows in members]
    for describe in (lambda rows: ", ".join(sorted({row.kind for row in rows})), lambda rows: rows[0].name):
        repeated = {title for title, count in Counter(titles).items() if count > 1}
        titles = [f"{t} ({describe(r)})" if t in repeated else t for t, r in zip(titles, members, strict=True)]
    return titles


def _span(layers: Iterable[str]) -> str:
    """Return the first and the last of the layers, or the only one."""
    names = list(dict.fromkeys(layers))
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _check_class(cls: Callable[..., torch.optim.Optimizer], name: str, rows: Sequence[Row]) -> None:
    kind = getattr(cls, "func", cls)
    if kind is torch.optim.LBFGS:
        raise SpecError(
            f"{name} takes no parameter groups and evaluates its closure several times a step, so neither a plan's "
            "rates nor its pull can act in it, even if all rates are equal. Use AdamW or SGD."
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


def _check_weight_decay(name: str, plan: Plan, options: Mapping[str, Any]) -> None:
    covered = [row for row in plan.trained if plan.penalties_on(row)]
    if covered and float(options.get("weight_decay", 0.0)) != 0.0:
        first, by = covered[0], plan.penalties_on(covered[0])[0].by
        raise SpecError(
            f"{name}: weight_decay={options['weight_decay']:g} pulls to zero {counted(len(covered), 'parameter')} that "
            f"{by} already pulls ({first!r}, …). Leave weight_decay out, or leave {by} out."
        )


def _check_shards(decision: Update | After | Penalty, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if a decision acts on sharded parameters and cannot: at all, or as they are cut."""
    if isinstance(decision, Penalty):
        refused, by_elements = decision.sums_over in ("all", "parameters"), decision.sums_over == "elements"
    else:
        refused, by_elements = not type(decision).shards, False
    for name in getattr(decision, "names", ()):
        if not sharded(parameters[name]):
            continue
        if refused:
            raise SpecError(
                f"{decision.by} acts on whole tensors, but {name!r} is sharded over processes. Train with DDP instead "
                f"of FSDP, or leave {decision.by} out."
            )
        if not by_elements and not by_rows(parameters[name]):
            raise SpecError(
                f"{decision.by} takes parameters that are sharded along their first dimension, but {name!r} is cut "
                f"otherwise: {parameters[name].placements}. Shard it by rows, or leave {decision.by} out."  # type: ignore[attr-defined]
            )


def _check_precision(update: Update, parameters: Mapping[str, nn.Parameter]) -> None:
    for name in update.names:
        check_precision(update, name, parameters[name])


def _check_row(plan: Plan, row: Row, parameter: nn.Parameter, rate: float) -> None:
    """Raise unless the penalties on a parameter can be carried out at its largest rate."""
    penalties = plan.penalties_on(row.name)
    for column in ("pull", "decay"):
        strength = getattr(row, column)
        if strength is not None and all(penalty.column != column for penalty in penalties):
            raise SpecError(
                f"{row.chosen[column].by} gives {row.name!r} a {column} of {strength:g}, but no penalty of the plan "
                f"acts on it. Add one whose column is {column!r} with plan.with_penalty(...)."
            )
    if not penalties:
        return
    check_precision(penalties[0], row.name, parameter)
    step = rate * plan.strength_of(row.name, "decoupled")
    if step > 1:
        raise SpecError(
            f"{row.name!r}: a decoupled pull of rate × strength = {step:g} overshoots the source (1 reaches it "
            "in one step). Lower alpha, beta or the rate."
        )
