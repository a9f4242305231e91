"""Laws of a training step that every way of staying close to the source keeps, a user's own included.

Each law trains the same adaptation in two ways that must give the same weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import InputError
from conservtl.kernels.gradient import GradientKernel, as_handed
from conservtl.layers import named_parameters
from conservtl.plan.penalty import Penalty
from conservtl.plan.update import Moving
from conservtl.runtime.parameter_index import penalised
from conservtl.testing.steps import evaluated

__all__ = ["LAWS", "LawCase", "check_law"]

_SCALE = 2.0**12  # a power of two changes no digit of a gradient
_CLIP = 0.5


@dataclass(frozen=True)
class LawCase:
    """What the laws are tried on.

    Args:
        label: of the strategy, for messages.
        make: () -> an adaptation that can make an optimizer, the same at each call.
        rebuild: () -> the same adaptation without measurements, with weights of any values.
        objective: (adaptation, batch) -> the loss with the plan's terms, the mean over the batch.
        batch: a batch.
        parts: batches of equal sizes that make up ``batch``.
        doubled: the batch twice over; None: the law of the doubled batch is not tried.
        optimizer: its class.
        options: its arguments, ``lr`` among them.
        steps: how many steps each law trains.
    """

    label: str
    make: Callable[[], Adaptation]
    rebuild: Callable[[], Adaptation]
    objective: Callable[[Adaptation, Any], Tensor]
    batch: Any
    parts: Sequence[Any]
    doubled: Any = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "momentum": 0.9})
    steps: int = 3

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Weights before the first step."""
        return weights(self.make())

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """Weights after the steps of an ordinary loop."""
        return self.train()

    def train(self, **how: Any) -> dict[str, Tensor]:
        """Return the weights after some steps from the start; ``how`` is that of ``step``."""
        adaptation = self.make()
        optimizer = adaptation.optimizer(self.optimizer, **self.options)
        for _ in range(self.steps):
            self.step(adaptation, optimizer, **how)
        return weights(adaptation)

    def step(
        self,
        adaptation: Adaptation,
        optimizer: torch.optim.Optimizer,
        *,
        parts: Sequence[Any] | None = None,
        scaler: GradScaler | None = None,
        clip: float | None = None,
        sign: float = 1.0,
    ) -> None:
        """Make one step.

        Args:
            adaptation: the adaptation.
            optimizer: made by it.
            parts: batches that are accumulated; None: the whole batch.
            scaler: of the gradients.
            clip: largest norm of the gradients, the pull included; None: no clipping.
            sign: of the loss.
        """
        self.backward(adaptation, parts, sign=sign, scaler=scaler)
        if clip is not None:
            adaptation.pull(scaler)
            torch.nn.utils.clip_grad_norm_(adaptation.model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    def backward(
        self,
        adaptation: Adaptation,
        parts: Sequence[Any] | None = None,
        *,
        sign: float = 1.0,
        scaler: GradScaler | None = None,
    ) -> None:
        """Compute the gradients of the loss."""
        evaluated(adaptation.model)
        batches = [self.batch] if parts is None else parts
        for batch in batches:
            loss = sign * self.objective(adaptation, batch) / len(batches)
            if loss.requires_grad:
                (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]


def weights(adaptation: Adaptation) -> dict[str, Tensor]:
    """Return a copy of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in named_parameters(adaptation.model).items()}


def scaled_gradients(case: LawCase) -> str | None:
    """A loss scale that is divided out before the step changes nothing, nor does ``pull()`` without clipping."""
    for clip in (None, inf, _CLIP):
        expected = case.train(clip=clip) if clip == _CLIP else case.plain
        for scaled in (False, True) if clip == inf else (True,):
            scaler = GradScaler("cpu", init_scale=_SCALE) if scaled else None
            if name := _difference(case, expected, case.train(scaler=scaler, clip=clip)):
                how = "" if clip is None else " with adaptation.pull()" if clip == inf else " with clipping"
                return f"{name!r} moves otherwise{' under a GradScaler' * scaled}{how}"
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
        return f"{name!r} moves otherwise when a fused optimizer carries a loss scale; multiply by step.scale"
    return None


def accumulation(case: LawCase) -> str | None:
    """Gradients accumulated over parts of a batch give the step of the whole batch."""
    if name := _difference(case, case.plain, case.train(parts=case.parts)):
        return f"{name!r} moves otherwise when gradients are accumulated; act once an optimizer step"
    return None


def doubled_batch(case: LawCase) -> str | None:
    """A batch twice over gives the same step: no strength depends on the batch size."""
    if case.doubled is None:
        return None
    if name := _difference(case, case.plain, case.train(parts=[case.doubled])):
        return f"{name!r} moves otherwise when the batch is given twice over; take means over the batch"
    return None


def maximization(case: LawCase) -> str | None:
    """Going up the negative loss is going down the loss."""
    adaptation = case.make()
    optimizer = adaptation.optimizer(case.optimizer, **case.options, maximize=True)
    for _ in range(case.steps):
        case.step(adaptation, optimizer, sign=-1.0)
    if name := _difference(case, case.plain, weights(adaptation)):
        return f"{name!r} moves otherwise when the optimizer maximises; heed item.group['maximize']"
    return None


def missing_gradient(case: LawCase) -> str | None:
    """A parameter without a gradient moves as one whose gradient is zero."""
    results = []
    for missing in (False, True):
        adaptation = case.make()
        optimizer = adaptation.optimizer(case.optimizer, **case.options)
        for _ in range(case.steps):
            case.backward(adaptation)  # adds the plan's terms, without which a step is refused
            parameters = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
            for parameter in parameters:
                parameter.grad = None if missing else torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(adaptation))
    if name := _difference(case, *results):
        return f"{name!r} moves otherwise if its gradient is None than if it is zero"
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
        return f"{moved[0]!r} moves otherwise after resuming; keep what an update remembers in its state"
    return None


def deep_copy(case: LawCase) -> str | None:
    """A deep copy trains as its original, and neither changes the other."""
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
    return f"{moved[0]!r} moves otherwise in a deep copy" if moved else None


def penalty_gradient(case: LawCase) -> str | None:
    """A penalty's gradient is that of its value, of all parameters and of the parts it is a sum over."""
    adaptation = case.make()
    parameters = named_parameters(adaptation.model)
    rate = 1e-3
    for penalty in adaptation.plan.penalties:
        rows = [adaptation.plan[name] for name in penalty.names if name not in adaptation.frozen]
        moving = [penalised(penalty, adaptation.bound, row, parameters[row.name], {"lr": rate}) for row in rows]
        handed = [as_handed(item) for item in moving]
        if not handed:
            continue
        expected = Penalty.gradient(penalty, handed)
        size = max(map(_largest, expected))
        given = {"gradient()": penalty.gradient(handed)}
        if penalty.sums_over != "all":
            given["gradient() of one parameter at a time"] = [penalty.gradient([item])[0] for item in handed]
        if penalty.sums_over in ("rows", "elements"):
            given["gradient() of one row at a time"] = [_by_rows(penalty, item) for item in handed]
        if penalty.sums_over == "elements":
            flat = [_by_rows(penalty, _flat(item)) for item in handed]
            given["gradient() of one element at a time"] = [
                gradient.view_as(item.parameter) for gradient, item in zip(flat, handed, strict=True)
            ]
        for kernel in penalty.kernels(moving) or (GradientKernel(penalty, moving),):
            with torch.no_grad():
                kernel.add_gradients(1.0, None)
        given["the kernel"] = [gradient_of(item.parameter) for item in moving]
        for what, gradients in given.items():
            for item, gradient, wanted in zip(moving, gradients, expected, strict=True):
                if not _close(wanted, gradient, size):
                    return f"{what} of {penalty.by} is not the gradient of value() for {item.name!r}"
    return None


def gradient_of(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, zero if there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _by_rows(penalty: Penalty, item: Moving) -> Tensor:
    """Return the gradient of a penalty handed one row at a time."""
    count = len(item.parameter) if item.parameter.ndim else 0
    if not count:
        return penalty.gradient([item])[0]
    rows = [_changed(item, partial(torch.narrow, dim=0, start=at, length=1)) for at in range(count)]
    return torch.cat([penalty.gradient([row])[0] for row in rows])


def _flat(item: Moving) -> Moving:
    return _changed(item, lambda tensor: tensor.reshape(-1))


def _changed(item: Moving, change: Callable[[Tensor], Tensor]) -> Moving:
    anchor = None if item.anchor is None else change(item.anchor)
    measured = {name: change(tensor) for name, tensor in item.measured.items()}
    return replace(item, parameter=change(item.parameter), anchor=anchor, measured=measured)


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
"""Name -> law: what breaks it, or None."""


def check_law(name: str, case: LawCase) -> None:
    """Hold a strategy to one law.

    Args:
        name: one of ``LAWS``.
        case: what to try it on.

    Raises:
        AssertionError: it breaks the law, or an error of its own stops it.
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
    """Return the first parameter that differs by more than rounding, measured by how far training moved anything."""
    moved = max((_largest(weight - case.start[name]) for name, weight in first.items()), default=0.0)
    differs = (name for name, weight in first.items() if not _close(weight, second[name], moved))
    return next(differs, None)


def _close(first: Tensor, second: Tensor, size: float) -> bool:
    """Whether two tensors are equal but for rounding, of themselves or of numbers of a size that they are sums of."""
    digits = torch.finfo(first.dtype).eps
    allowed: float = 16 * digits * max(1.0, _largest(first)) + digits**0.6 * size
    return _largest(first - second) <= allowed


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
