"""The contract of a strategy, which a user's own can be held to in one line."""

from __future__ import annotations

from typing import Any

from torch import nn

from conservtl.errors import InputError
from conservtl.methods import Strategy
from conservtl.source.read import SourceLike
from conservtl.testing._cases import cases, require
from conservtl.testing._extension_checks import check_extended_modules, check_extension
from conservtl.testing._plan_checks import check_memory, check_place, check_pure
from conservtl.testing._situation_checks import check_situations
from conservtl.testing._spec_checks import check_spec
from conservtl.testing._training_checks import check_skipped, check_training, law_case
from conservtl.testing.laws import LAWS, check_law

__all__ = ["check_strategy"]


def check_strategy(
    strategy: Strategy, *, model: nn.Module | None = None, source: SourceLike | None = None, example: Any = None
) -> None:
    """Hold a strategy to the contract that every strategy keeps.

    It is a frozen spec: no unknown fields, a ``kind``, a description under every field, the same after JSON. ``apply``
    is a pure function of the plan, keeps its rows, and does not depend on the strategy's place in the list. A model
    adapted by it trains: frozen tensors stay the same bit for bit, each trained parameter is in one group, no skipped
    step moves anything, and no model affects another. Each step keeps the laws of ``conservtl.testing.laws``: loss
    scales, accumulation, the batch size, the sign of the loss and missing gradients make no difference, training
    resumes bit for bit, and a penalty's gradient is that of its value. On small models with frozen parts, a tied head,
    a layer that does not run in a step, several outputs and padding (``frozen_parts()`` and the other generators) it is
    right or raises an ``InputError``.

    Args:
        strategy: the strategy.
        model: a model to apply it to, which is copied. None: a small convolutional network of nine layers, once with a
            head that does not fit the source and once with one that does.
        source: the source; None: random weights for all of the model.
        example: an input. It is needed to try batch norms of a model of your own.

    Raises:
        AssertionError: the strategy breaks the contract; the message says which rule or law.
        InputError: the strategy cannot be applied to any of the models; pass one that it fits.

    Example:
        >>> from conservtl import DiscriminativeLR
        >>> check_strategy(DiscriminativeLR(decay=0.8))
    """
    check_spec(strategy)
    refusals = []
    laws_checked = False  # on one model only: they take half of the time
    tried = list(cases(model, source, example))
    for case in tried:
        try:
            plan = case.drawn(strategy)
            before = plan.model_dump_json()
            strategy.apply(plan)
        except InputError as error:
            refusals.append(error)
            continue
        rule = "apply changed the plan it was given; return a new one."
        require(plan.model_dump_json() == before, strategy, rule)
        if strategy.extends:
            check_extension(strategy, case)
        check_pure(strategy, plan)
        check_place(strategy, plan)
        check_memory(strategy, plan)
        check_extended_modules(strategy, case)
        check_training(strategy, case)
        check_skipped(strategy, case)
        if not laws_checked and (step := law_case(strategy, case)) is not None:
            laws_checked = True
            for law in LAWS:
                check_law(law, step)
    if len(refusals) == len(tried):
        raise refusals[0]
    check_situations(strategy)
