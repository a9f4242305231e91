"""Part of the contract: an adapted model trains, and a step keeps the laws of ``conservtl.testing.laws``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.batches import map_tensors
from conservtl.layers import named_parameters
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy
from conservtl.testing._cases import RATE, Case, require
from conservtl.testing.law_case import LawCase
from conservtl.testing.steps import backward, doubled, held, measured, objective, outputs_of

__all__ = ["check_skipped", "check_training", "law_case", "train"]


def check_training(strategy: Strategy, case: Case) -> None:
    """Raise unless adapted models train independently, copies alike, and the strategy plans as before afterwards."""
    first, second = case.adapted([strategy]), case.adapted([strategy])
    start = {name: tensor.clone() for name, tensor in second.model.state_dict().items()}
    if not first.plan.trained or not measured(first, case.example):
        return
    copied = copy.deepcopy(first)
    train(strategy, first, case.example)
    _check_finite(strategy, first)
    unchanged = all(torch.equal(start[name], tensor) for name, tensor in second.model.state_dict().items())
    require(unchanged, strategy, "training one model changed another.")
    train(strategy, copied, case.example)
    expected = named_parameters(copied.model)
    same = all(torch.equal(p, expected[name]) for name, p in named_parameters(first.model).items())
    rule = "a deep copy of the adaptation trains differently; an update keeps its memory in `state`, which is copied."
    require(same, strategy, rule)
    same = case.adapted([strategy]).plan == second.plan
    require(same, strategy, "gives another plan after a model has been trained.")


def train(strategy: Strategy, adaptation: Adaptation, example: Any) -> None:
    """Make two steps in each phase. Raise unless groups are complete and frozen tensors stay the same."""
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    listed = [name for group in optimizer.param_groups for name in group["param_names"]]
    rule = "the optimizer's groups must hold each parameter trained in some phase once."
    require(sorted(listed) == sorted(adaptation.plan.trained), strategy, rule)
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        adaptation.model.train()
        before = {name: tensor.clone() for name, tensor in held(adaptation).items()}
        for step in range(2):
            optimizer.zero_grad()
            backward(adaptation, example, step)
            optimizer.step()
        for name, tensor in held(adaptation).items():
            require(torch.equal(tensor, before[name]), strategy, f"{name!r} is frozen in phase {phase + 1} and moved.")


def _check_finite(strategy: Strategy, adaptation: Adaptation) -> None:
    """Raise unless all trained weights are finite after training from the source."""
    for name, parameter in named_parameters(adaptation.model).items():
        if name in adaptation.plan.trained and not bool(parameter.isfinite().all()):
            rule = f"{name!r} is not finite after training from w = w0."
            if any(name in penalty.names for penalty in adaptation.plan.penalties):
                rule += " Check the penalty's gradient at w = w0: a square root has none at 0."
            require(False, strategy, rule)


def check_skipped(strategy: Strategy, case: Case) -> None:
    """Raise if a parameter moves in a step that a fused optimizer skips because a gradient is not finite."""
    adaptation = case.adapted([strategy])
    parameters = named_parameters(adaptation.model)
    if not all(parameter.is_floating_point() for parameter in parameters.values()):
        return
    if not adaptation.plan.trained or not measured(adaptation, case.example):
        return
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, fused=True)
    backward(adaptation, case.example, 0)
    optimizer.found_inf = torch.ones((), device=next(iter(parameters.values())).device)  # type: ignore[attr-defined]
    optimizer.step()
    moved = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    require(not moved, strategy, f"{moved[:1]} moved in a step that was skipped; heed step.skip.")


def _check_terms(strategy: Strategy, adaptation: Adaptation, example: Any) -> None:
    """Raise if no term has a gradient, so that none would ever act."""
    share = torch.ones((), requires_grad=True)
    loss = objective(adaptation, example, share=share)
    if not adaptation.plan.terms or not loss.requires_grad:
        return
    (value,) = torch.autograd.grad(loss, share, create_graph=True, allow_unused=True)
    acts = value is not None and value.requires_grad
    require(acts, strategy, "the value of its term has no gradient; compute it from outputs that are not detached.")


def law_case(strategy: Strategy, case: Case) -> LawCase | None:
    """Return a case for the laws of a step; None if nothing is trained or a search must come first.

    Its weights have moved away from the source, and are in double precision if the model supports that.
    """
    model = deep_copy(case.model).double()
    example = map_tensors(case.example, lambda t: t.double() if t.is_floating_point() else t)
    try:
        outputs_of(deep_copy(model).eval(), example)
    except RuntimeError:
        model, example = case.model, case.example
    precise = replace(case, model=model, example=example)
    ready = precise.adapted([strategy])
    parameters = named_parameters(ready.model)
    if not all(parameter.is_floating_point() for parameter in parameters.values()):
        return None
    if not ready.plan.trained or not measured(ready, example):
        return None
    ready.start_phase(len(ready.plan.phases) - 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in ready.frozen:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    _check_terms(strategy, deep_copy(ready), example)
    means = all(type(term).mean_over_batch for term in ready.plan.terms)
    return LawCase(
        label=strategy.label,
        make=lambda: deep_copy(ready),
        rebuild=lambda: precise.adapted([strategy]),
        objective=objective,
        batch=example,
        parts=(example, example),
        doubled=doubled(deep_copy(model).eval(), example) if means and example is not None else None,
        options={"lr": RATE, "momentum": 0.9},
        steps=2,
    )
