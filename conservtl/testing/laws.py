"""Laws of a training step, which every strategy keeps, a user's own included.

Most laws train the same adaptation in two ways that must give the same weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from math import inf

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.errors import InputError
from conservtl.layers import named_parameters
from conservtl.testing._penalty_law import penalty_gradient
from conservtl.testing.law_case import LawCase, close, largest, weights

__all__ = ["LAWS", "check_law"]

_SCALE = 2.0**12  # a power of two changes no digit of a gradient
_CLIP = 0.5


def scaled_gradients(case: LawCase) -> str | None:
    """A loss scale that is divided out before the step changes nothing, nor does ``pull()`` without clipping."""
    for clip in (None, inf, _CLIP):
        expected = case.train(clip=clip) if clip == _CLIP else case.plain
        for scaled in (False, True) if clip == inf else (True,):
            scaler = GradScaler("cpu", init_scale=_SCALE) if scaled else None
            if name := _difference(case, expected, case.train(scaler=scaler, clip=clip)):
                how = "" if clip is None else " with adaptation.pull()" if clip == inf else " with clipping"
                return f"{name!r} moves differently{' under a GradScaler' * scaled}{how}"
    return None


def fused_scale(case: LawCase) -> str | None:
    """A loss scale that a fused optimizer divides out inside its step changes nothing."""
    results = []
    for scale in (1.0, _SCALE):
        adaptation = case.make()
        optimizer = adaptation.optimizer(torch.optim.SGD, **{**case.options, "fused": True})
        for _ in range(case.steps):
            case.backward(adaptation, sign=scale)
            device = next(iter(named_parameters(adaptation.model).values())).device
            optimizer.grad_scale = torch.full((), scale, device=device)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(adaptation))
    if name := _difference(case, *results):
        return f"{name!r} moves differently when a fused optimizer carries a loss scale; multiply by step.scale"
    return None


def accumulation(case: LawCase) -> str | None:
    """Gradients accumulated over parts of a batch give the step of the whole batch."""
    if name := _difference(case, case.plain, case.train(parts=case.parts)):
        return f"{name!r} moves differently when gradients are accumulated; act once an optimizer step"
    return None


def doubled_batch(case: LawCase) -> str | None:
    """A batch twice over gives the same step: no strength depends on the batch size."""
    if case.doubled is None:
        return None
    if name := _difference(case, case.plain, case.train(parts=[case.doubled])):
        return f"{name!r} moves differently when the batch is given twice over; take means over the batch"
    return None


def maximization(case: LawCase) -> str | None:
    """Maximising the negative loss is minimising the loss."""
    adaptation = case.make()
    optimizer = adaptation.optimizer(case.optimizer, **case.options, maximize=True)
    for _ in range(case.steps):
        case.step(adaptation, optimizer, sign=-1.0)
    if name := _difference(case, case.plain, weights(adaptation)):
        return f"{name!r} moves differently when the optimizer maximises; heed item.group['maximize']"
    return None


def missing_gradient(case: LawCase) -> str | None:
    """A parameter without a gradient moves as one whose gradient is zero."""
    results = []
    for missing in (False, True):
        adaptation = case.make()
        optimizer = adaptation.optimizer(case.optimizer, **case.options)
        for _ in range(case.steps):
            case.backward(adaptation)  # adds the plan's terms, without which a step is refused
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            for parameter in parameters:
                parameter.grad = None if missing else torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(adaptation))
    if name := _difference(case, *results):
        return f"{name!r} moves differently with a gradient of None than with zeros"
    return None


def resume(case: LawCase) -> str | None:
    """Training resumed from its saved state goes on bit for bit."""
    adaptation = case.make()
    optimizer = adaptation.optimizer(case.optimizer, **case.options)
    for _ in range(2):
        case.step(adaptation, optimizer)
    file = io.BytesIO()
    torch.save([adaptation.model.state_dict(), adaptation.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, state, other = torch.load(file, weights_only=True)
    again = case.rebuild()
    again.model.load_state_dict(model)
    again.load_state_dict(state)
    resumed = again.optimizer(case.optimizer, **case.options)
    resumed.load_state_dict(other)
    case.step(adaptation, optimizer)
    case.step(again, resumed)
    expected = weights(again)
    moved = [name for name, weight in weights(adaptation).items() if not torch.equal(weight, expected[name])]
    if moved:
        return f"{moved[0]!r} moves differently after resuming; keep what an update remembers in its state"
    return None


def deep_copy(case: LawCase) -> str | None:
    """A deep copy trains like its original, and neither changes the other."""
    first = case.make()
    second = copy.deepcopy(first)
    before = weights(second)
    results = []
    for adaptation in (first, second):
        if any(not torch.equal(weight, before[name]) for name, weight in weights(adaptation).items()):
            return "training one of two copies changed the other"
        case.step(adaptation, adaptation.optimizer(case.optimizer, **case.options))
        results.append(weights(adaptation))
    moved = [name for name, weight in results[0].items() if not torch.equal(weight, results[1][name])]
    return f"{moved[0]!r} moves differently in a deep copy" if moved else None


LAWS: dict[str, Callable[[LawCase], str | None]] = {
    "penalty gradient": penalty_gradient,
    "loss scale": scaled_gradients,
    "fused loss scale": fused_scale,
    "accumulation": accumulation,
    "doubled batch": doubled_batch,
    "maximization": maximization,
    "missing gradient": missing_gradient,
    "resuming": resume,
    "deep copy": deep_copy,
}
"""Name -> law, which returns how a case breaks it, or None."""


def check_law(name: str, case: LawCase) -> None:
    """Hold a strategy to one law.

    Raises:
        AssertionError: the strategy breaks the law, or raises an error that is no ``InputError``.
    """
    law = LAWS[name]
    try:
        broken = law(case)
    except InputError:
        raise
    except Exception as error:
        raise AssertionError(f"{case.label} breaks the law of {name}: {error!r}. {law.__doc__}") from error
    if broken is not None:
        raise AssertionError(f"{case.label} breaks the law of {name}: {broken}. {law.__doc__}")


def _difference(case: LawCase, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str | None:
    """Return the first parameter that differs by more than rounding, relative to the largest move in training."""
    moved = max((largest(weight - case.start[name]) for name, weight in first.items()), default=0.0)
    return next((name for name, weight in first.items() if not close(weight, second[name], moved)), None)
