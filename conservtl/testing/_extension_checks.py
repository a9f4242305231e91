"""Part of the contract: what a strategy adds to a model or changes in its modules can be taken away again."""

from __future__ import annotations

import pickle  # reads what it has written # nosec B403
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.compat import forward_hooks, forward_pre_hooks
from conservtl.layers import find_layers, named_parameters
from conservtl.layers.copying import deep_copy
from conservtl.layers.extended import extended_modules, restore_module
from conservtl.methods import Strategy
from conservtl.plan.plan import Plan
from conservtl.testing._cases import Case, require
from conservtl.testing.steps import outputs_of

__all__ = ["check_extended_modules", "check_extension"]


def check_extension(strategy: Strategy, case: Case) -> None:
    """Raise unless ``extend`` adds a neutral part that acts once it moves, and ``merge`` and ``retract`` remove it."""
    model = deep_copy(case.model).eval()
    before, outputs = _described(model), outputs_of(model, case.example)
    added = strategy.extend(model, find_layers(model, case.example), case.example)
    names = list(named_parameters(model))
    require(set(added) == set(names) - before[0].keys(), strategy, "extend must return what it added.")
    require(_described(model)[1:] != before[1:], strategy, "extend changed nothing, but the strategy says it does.")
    rule = "extend added no parameters; if it replaces the head, declare that: replaces_head = True."
    require(bool(added) or strategy.replaces_head, strategy, rule)
    new = [*added, *(_head(model, case.example) if strategy.replaces_head else ())]
    same = strategy.replaces_head or _same(outputs, outputs_of(model, case.example))
    require(same, strategy, "extend changed what the model computes.")
    reloaded = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here # nosec B301
    for one in (model, deep_copy(model), reloaded):
        _disturb(one, new)
        changed = outputs_of(one, case.example)
        acts = not case.ordered or not _same(outputs, changed)  # units of the caller's model may be dead
        require(acts, strategy, "what it added has no effect on what the model computes.")
        merged = deep_copy(one)
        emptied = strategy.merge(merged)
        require(_same(changed, outputs_of(merged, case.example)), strategy, "merge changed what the model computes.")
        left = _described(merged)[1:] != before[1:]
        require(emptied is not left, strategy, f"merge says {emptied}, but something is {'' if left else 'not '}left.")
        strategy.retract(one)
        after = _described(one)
        require(after[1:] == before[1:] and list(after[0]) == list(before[0]), strategy, "retract leaves something.")
        unchanged = all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
        require(unchanged, strategy, "extend or retract changed the model's own parameters.")


def check_extended_modules(strategy: Strategy, case: Case) -> None:
    """Raise unless extended modules keep the state dict's names, survive copies and pickles, and can be restored."""
    adaptation = case.adapted([strategy])
    if not adaptation.plan.extensions:
        return
    model, plain = adaptation.model.eval(), deep_copy(case.model)
    names = model.state_dict().keys() - {row.name for row in adaptation.plan.rows if row.added}
    require(names == plain.state_dict().keys(), strategy, "an extended module changed the names in the state dict.")
    extended = extended_modules(model)
    require(bool(extended), strategy, "its extension extends no module of the model.")
    outputs = outputs_of(model, case.example)
    for twin in (deep_copy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made here # nosec B301
        rule = "a copy of the model computes something else; keep the settings of an extended module in its settings."
        require(_same(outputs, outputs_of(twin, case.example)), strategy, rule)
    for module in extended.values():
        restore_module(module)
    left = not strategy.extends and _described(model)[1:] != _described(plain)[1:]
    require(not left, strategy, "something is left of its extension; change nothing but the class of a module.")
    acts = not case.ordered or not _same(outputs, outputs_of(model, case.example))
    require(acts, strategy, "its extension has no effect on what the model computes.")


def _head(model: nn.Module, example: Any) -> tuple[str, ...]:
    """Return the parameters of a model's head."""
    return Plan.draw(find_layers(model, example), {}, {}).head


def _described(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, type]], list[int]]:
    """Return parameters and buffers, modules in order, and the number of hooks of each."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(forward_hooks(m)) + len(forward_pre_hooks(m)) for m in model.modules()]
    return tensors, [(name, type(module)) for name, module in model.named_modules()], hooks


@torch.no_grad()
def _disturb(model: nn.Module, names: Iterable[str]) -> None:
    """Add noise to some parameters."""
    generator = torch.Generator().manual_seed(1)
    parameters = named_parameters(model)
    for name in names:
        noise = torch.randn(parameters[name].shape, generator=generator)
        parameters[name].add_(noise.to(parameters[name]) / max(1, len(noise)) ** 0.5)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether outputs are equal up to rounding."""
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))
