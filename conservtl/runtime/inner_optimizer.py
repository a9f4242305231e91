"""Optimizers around optimizers: find the one that moves the weights, and check that a plan can act in its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError, counted
from conservtl.plan.plan import Plan
from conservtl.plan.update import Update

__all__ = ["check_groups", "check_moves", "check_steps", "inner_optimizer"]

_PAIRS = (("first_step", "second_step"), ("ascent_step", "descent_step"))
_STEPS = 4  # of a trial: a wrapper that averages weights differs from its inner optimizer from the second on


def inner_optimizer(optimizer: Any, name: str) -> torch.optim.Optimizer:
    """Return the optimizer inside all wrappers, in whose step penalties and updates act; itself if there is none.

    Raises:
        SpecError: it holds several, it is none, or its steps have two parts that only an inner optimizer could unite.
    """
    inner = list(_held(optimizer))
    if len(inner) > 1:
        raise SpecError(
            f"{name} holds {len(inner)} optimizers, and a plan acts in the step of one. Use one for all parameters."
        )
    if inner:
        return inner_optimizer(inner[0], name)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"{name} gives a {type(optimizer).__name__}, which is no torch optimizer and holds none.")
    if (pair := _pair(optimizer)) is not None:
        raise SpecError(
            f"{name}: its {pair[0]} and {pair[1]} call no step, so the plan cannot act in one. Use a variant that "
            "wraps a base optimizer and calls its step()."
        )
    return optimizer


def check_groups(
    optimizer: Any, inner: torch.optim.Optimizer, rates: Mapping[Tensor, tuple[str, float]], count: int
) -> None:
    """Raise unless the groups hold the plan's rates, and an inner optimizer has the same ones; complete their names."""
    name = type(optimizer).__name__
    found: set[Tensor] = set()
    for group in inner.param_groups:
        for parameter in group["params"]:
            own, rate = rates.get(parameter, ("", None))
            if rate is None or float(group["lr"]) != rate:
                raise SpecError(
                    f"{name}: its groups must keep the rates they are given; {repr(own) if own else 'a parameter'} has "
                    f"{float(group['lr']):g} instead of {rate or 0:g}. Make it from the groups that it receives."
                )
        found.update(group["params"])
        group.setdefault("param_names", [rates[parameter][0] for parameter in group["params"]])
    if missing := [own for parameter, (own, _) in rates.items() if parameter not in found]:
        raise SpecError(f"{name}: its groups must hold every trained parameter; {missing[0]!r} is missing.")
    if len(inner.param_groups) != count:
        kept = len(inner.param_groups)
        raise SpecError(f"{name}: it must keep the {counted(count, 'group')} it is given; it has {kept}.")
    groups = getattr(optimizer, "param_groups", inner.param_groups)
    if len(groups) != len(inner.param_groups) or any(
        a is not b for a, b in zip(groups, inner.param_groups, strict=True)
    ):
        raise SpecError(
            f"{name}: its inner optimizer has copies of its groups, so rates set later would not reach it. Make them "
            "the same: self.param_groups = base_optimizer.param_groups."
        )


def check_steps(make: Callable[[nn.Parameter], Any], name: str, device: torch.device) -> None:
    """Raise unless the inner optimizer steps once in a step of the outer one, from the weights that it began with.

    Tried on a small tensor: by ``step(closure)``, and by the two parts of a step where the class has them.
    """
    parameter = nn.Parameter(torch.ones(3, device=device))
    outer = make(parameter)
    seen: list[Tensor] = []
    inner = inner_optimizer(outer, name)
    inner.register_step_pre_hook(lambda *_: seen.append(parameter.detach().clone()))
    if callable(switch := getattr(outer, "train", None)):
        switch()

    @torch.enable_grad()
    def closure() -> Tensor:
        parameter.grad = None
        loss = parameter.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    pair = _pair(outer)

    def by_parts() -> None:
        for part in pair or ():
            closure()
            getattr(outer, part)()

    ways = [lambda: outer.step(closure), *([by_parts] if pair else [])]
    stepped = 0
    for number, step in enumerate(ways):
        for _ in range(_STEPS):
            before = parameter.detach().clone()
            seen.clear()
            try:
                step()
            except Exception as error:
                if number + 1 < len(ways):
                    break
                raise SpecError(f"{name}: a step on trial fails with {type(error).__name__}: {error}.") from error
            stepped += len(seen)
            if len(seen) > 1 or any(not torch.equal(weights, before) for weights in seen):
                raise SpecError(
                    f"{name}: its inner optimizer must step once in a step, from the weights of the model; it "
                    + (f"steps {len(seen)} times" if len(seen) > 1 else "steps from other weights")
                    + ", so a pull to the source would be wrong. Use an optimizer that averages in its own step, such "
                    "as schedulefree.AdamWScheduleFree, or wrap none."
                )
    if not stepped:
        raise SpecError(f"{name}: it must call its inner optimizer's step(); it does not, so the plan cannot act.")


def check_moves(optimizer: Any, plan: Plan, name: str) -> None:
    """Raise if a decision of the plan moves weights that the optimizer keeps in several versions.

    Raises:
        SpecError: a decoupled penalty or an update moves weights of a schedule-free optimizer, or an update replaces
            weights for a forward pass between the two parts of a step.
    """
    averages = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    moving = [penalty.by for penalty in plan.penalties if penalty.mode == "decoupled"] + [
        update.by
        for update in plan.updates
        if update.forward or (type(update).after is not Update.after and not update.layered)
    ]
    if averages and moving:
        raise SpecError(
            f"{name} keeps averaged weights beside the model's, which {moving[0]} moves without them. Use a coupled "
            f"penalty (mode='coupled'), another optimizer, or leave {moving[0]} out."
        )
    replaced = [update.by for update in plan.updates if update.forward]
    if replaced and _pair(optimizer) is not None:
        raise SpecError(
            f"{name} moves weights between two forward passes of a step, while {replaced[0]} replaces them in each. "
            f"Use its base optimizer, or leave {replaced[0]} out."
        )


def _held(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizers that an object holds in its attributes, once each."""
    values = list(vars(optimizer).values()) if hasattr(optimizer, "__dict__") else []
    values += [one for value in values if isinstance(value, (list, tuple)) for one in value]
    kinds = {
        id(value): value for value in values if isinstance(value, torch.optim.Optimizer) and value is not optimizer
    }
    yield from kinds.values()


def _pair(optimizer: Any) -> tuple[str, str] | None:
    """Return the names of the two parts of a step, if the optimizer has them."""
    return next((pair for pair in _PAIRS if all(callable(getattr(optimizer, part, None)) for part in pair)), None)
