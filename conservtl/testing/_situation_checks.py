"""Part of the contract: a strategy is right, or refused, on models with frozen parts, tied heads, and the like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import InputError
from conservtl.layers import matches, named_parameters
from conservtl.methods import Strategy
from conservtl.testing._cases import Case, require
from conservtl.testing._training_checks import train
from conservtl.testing.situations import SITUATIONS
from conservtl.testing.steps import measured, objective
from conservtl.testing.weights import random_weights

__all__ = ["check_situations"]

_WIDTH = 3


def check_situations(strategy: Strategy) -> None:
    """Raise unless the strategy is right, or refused, in each situation."""
    for what, check in _CHECKS.items():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model, example = SITUATIONS[what](_WIDTH)
            source = random_weights(model, 1)
        case = Case(model, source, example)
        adaptation: Adaptation | None = None
        try:
            adaptation = case.adapted([strategy])
            if adaptation.plan.trained and measured(adaptation, example):
                check(strategy, adaptation, case)
        except InputError:
            continue  # it does not fit this model, and says so
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if adaptation is None and _changes_modules(strategy, case):
                continue  # its modules are for models of another build
            rule = f"on a model with {what} it raises {type(error).__name__}: {error}. Handle it, or raise a SpecError."
            raise AssertionError(f"{strategy.label}: {rule}") from error


def _changes_modules(strategy: Strategy, case: Case) -> bool:
    return strategy.extends or bool(strategy.apply(case.drawn(strategy)).extensions)


def _check_frozen(strategy: Strategy, adaptation: Adaptation, case: Case) -> None:
    """Raise if what was handed in frozen is trained."""
    globs = list(_texts(strategy.model_dump()))  # those that match are named by the user
    found = [name for name, parameter in named_parameters(case.model).items() if not parameter.requires_grad]
    unnamed = [name for name in found if not any(matches(glob, name) for glob in globs)]
    trained = [name for name in unnamed if name in adaptation.plan.trained]
    rule = (
        f"{trained[:1]} asked for no gradient when the model was handed in, and is trained. Choose rows with "
        "explicit=False unless the user names them."
    )
    require(not trained, strategy, rule)
    train(strategy, adaptation, case.example)


def _check_tied(strategy: Strategy, adaptation: Adaptation, case: Case) -> None:
    """Raise if tied weights come apart."""
    train(strategy, adaptation, case.example)
    adaptation.finish()
    model: Any = adaptation.model
    require(model.out.weight is model.embed.weight, strategy, "tied weights are two tensors after training.")


def _check_dropped(strategy: Strategy, adaptation: Adaptation, case: Case) -> None:
    """Raise if a step fails, or is not finite, where a layer does not run."""
    train(strategy, adaptation, case.example)
    loss = objective(adaptation, case.example)
    require(bool(loss.isfinite()), strategy, "the loss is not finite in a step in which a layer does not run.")


def _check_several(strategy: Strategy, adaptation: Adaptation, case: Case) -> None:
    """Raise if terms of outputs alone see one of two outputs."""
    if any(term.taps or term.enters for term in adaptation.plan.terms):
        return
    _disturb(adaptation.model)
    model: Any = adaptation.model
    term = _term(adaptation, case.example)
    if term is None:
        return
    heads = [model.first.weight, model.second.weight]
    seen = [weight.requires_grad and _depends(term, weight) for weight in heads]
    rule = "its term sees one of the model's two outputs. Take all of them, or raise a SpecError."
    require(not any(seen) or all(seen) or not all(w.requires_grad for w in heads), strategy, rule)


def _check_masked(strategy: Strategy, adaptation: Adaptation, case: Case) -> None:
    """Raise if a term depends on padding, unless the strategy's fields say that it counts."""
    if getattr(strategy, "padding", None) == "count":
        return
    _disturb(adaptation.model)
    adaptation.model.eval()
    batch = case.example
    other = batch | {"x": batch["x"] + 10.0 * (1 - batch["attention_mask"].unsqueeze(2))}
    first, second = _term(adaptation, batch), _term(adaptation, other)
    if first is None or second is None:
        return
    rule = "its term depends on the values of padding. Leave it out: View.valid and View.counted say what counts."
    require(torch.allclose(first, second, rtol=1e-4, atol=1e-6), strategy, rule)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a strategy's fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in (*value, *value.values()) for text in _texts(one))
    elif isinstance(value, (list, tuple)):
        yield from (text for one in value for text in _texts(one))


def _term(adaptation: Adaptation, example: Any) -> Tensor | None:
    """Return the plan's terms for an example, without the task's loss; None if it has none."""
    if not adaptation.plan.terms:
        return None
    outputs = adaptation.model(**example) if isinstance(example, dict) else adaptation.model(example)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    target = torch.arange(len(first)) % first.shape[1]
    loss = nn.functional.cross_entropy(first, target)
    if not loss.requires_grad:
        return None
    task = 1.0
    for term in adaptation.plan.terms:
        task *= term.task
    return adaptation.loss(loss, outputs, example) - task * loss


def _depends(term: Tensor, weight: Tensor) -> bool:
    if not term.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(term, weight, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _disturb(model: nn.Module) -> None:
    """Move the weights away from the source's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.3)


_CHECKS: dict[str, Callable[[Strategy, Adaptation, Case], None]] = {
    "frozen parts": _check_frozen,
    "a tied head": _check_tied,
    "a layer that does not run in a step": _check_dropped,
    "several outputs": _check_several,
    "padding": _check_masked,
}
