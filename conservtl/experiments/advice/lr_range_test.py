"""The range test: how the loss falls and rises again while the learning rate grows, on a copy of the model."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine import Training, best_block
from conservtl.engine.batching import Contents, Held, Streamed, as_batches
from conservtl.engine.epoch import Augment
from conservtl.engine.evaluation import Functions
from conservtl.engine.randomness import preserve_rng, seed_all
from conservtl.engine.session import Session, open_session
from conservtl.errors import SpecError
from conservtl.experiments.run.evaluation_sets import valid_sets
from conservtl.experiments.run.setting import augmentation, prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec
from conservtl.functions import accuracy, cross_entropy, forward
from conservtl.plan.plan import Plan

__all__ = ["RangeTest", "lr_find", "range_test"]

_SHARE = 0.1  # of the rate at the minimum: there the loss still falls, a decade further it already rises
_FLAT = 0.05  # of the way from the minimum back to the start: less is no rise
_WIDTH = 3.0  # steps: batches of a few examples differ by more than neighbouring rates do
_DIVERGED = 4.0  # times the lowest loss, as is usual, and above where it began
_CLASSIFICATION = Functions(forward, cross_entropy, accuracy)
_LOOK = 10  # steps between two looks at the losses, which wait for the device


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw.

    Args:
        rates: of the optimizer, rising geometrically; the plan's ratios multiply them.
        losses: the loss at each step, before it is made.
        smoothed: the same, averaged over neighbouring steps.
        suggestion: what ``training.lr`` may be: a tenth of the rate at the smoothed loss's minimum; where that is flat,
            of the highest rate on it.
        steepest: the rate at which the smoothed loss falls fastest over the logarithm of the rate: the least that is
            worth trying.
        diverged: whether it ended because the loss rose, before the last rate.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    steepest: float
    diverged: bool


def lr_find(spec: SpeechSpec | VisionSpec, *, steps: int = 100) -> RangeTest:
    """The range test of a spec's strategies on its shots.

    Args:
        spec: what would be run; its own rate does not matter.
        steps: how many.

    Raises:
        DataError: the data is missing or contradicts the spec.
        SpecError: nothing is trained, or the loss is not finite at any rate.
    """
    setting = prepare(spec)
    source = obtain_source(setting)
    domains = setting.domains
    return range_test(
        setting.adaptation(source.model),
        domains.shots,
        spec.training,
        valid=valid_sets(setting, source, both=False),
        source=domains.source_train,
        augment=augmentation(domains.augmentation),
        seed=spec.seed,
        steps=steps,
    )


def range_test(
    adaptation: Adaptation,
    train: Any,
    training: Training | None = None,
    *,
    valid: dict[str, Any] | None = None,
    source: Any = None,
    augment: Augment | None = None,
    seed: int = 0,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    r"""Train a copy while the rate rises geometrically, until the loss diverges; nothing else is changed.

    .. math:: \eta_t = \eta_0 (\eta_1 / \eta_0)^{t / (T - 1)}

    The copy is trained as ``fit`` would train in the plan's last phase: the plan's ratios, pull and terms, the
    settings' optimizer, precision and batch norms; their schedule gives way. Two rates are read off the losses, which
    are smoothed over neighbouring steps without a lag: where they fall fastest, and a tenth of where they are lowest.
    The second is suggested: on few examples the first comes early, where a model that begins near its goal has
    learned the easy ones and nothing else.

    Args:
        adaptation: what ``adapt`` made.
        train: as for ``fit``.
        training: settings; epochs, rate and schedule do not matter.
        valid: as for ``fit``, for strategies that choose before training.
        source: source data, for what the plan must measure on it.
        augment: as for ``fit``.
        seed: of the order of batches and of what is random in the model.
        lowest: the first rate.
        highest: the last rate; lower where a decoupled pull would overshoot the source before it.
        steps: how many there are.

    Raises:
        SpecError: nothing is trained, rates that do not rise, a strategy that gives absolute rates, or a loss that is
            not finite from the first steps on.

    Reference:
        Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.
    """
    if not 0 < lowest < highest or steps < 10:
        raise SpecError(
            f"range test: the rates must rise from above 0, in 10 steps at least; received {lowest:g} to {highest:g} "
            f"in {steps}. Choose others."
        )
    if not adaptation.plan.trained:
        raise SpecError("range test: the plan trains nothing, so there is no rate to find. Train a layer.")
    highest = _reach(adaptation.plan, highest)
    settings = (training or Training()).model_copy(update={"lr": highest, "schedule": "constant", "warmup": 0.0})
    own = copy.deepcopy(adaptation)
    with preserve_rng(), open_session(own, settings) as session:
        seed_all(seed)
        batches = as_batches(train, settings.batch_size, session.device, shuffle=True)
        _measure(own, batches, source, valid, settings)
        session.begin()
        session.start_phase(len(own.plan.phases) - 1)
        rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
        losses = _losses(session, _endless(batches), rates, augment, seed)
    return _read(rates, losses)


def _reach(plan: Plan, highest: float) -> float:
    """The highest rate at which no decoupled pull goes farther than all of the way back."""
    most = max(phase.scale for phase in plan.phases)
    for name in plan.trained:
        row = plan[name]
        if row.lr is not None:
            raise SpecError(
                f"range test: {row.chosen['rate'].by} gives {name!r} the absolute rate {row.lr:g}, which training.lr "
                "does not change. Give ratios instead: leave its lr, source and fresh out."
            )
        strength = plan.strength_of(name, "decoupled") * row.scale * most
        if strength * highest > 1:
            highest = 1 / strength
    return highest


def _measure(
    own: Adaptation, batches: Held | Streamed, source: Any, valid: dict[str, Any] | None, settings: Training
) -> None:
    """What the plan must know before an optimizer can be made, as ``fit`` finds it."""
    for one in own.bound.unmeasured():
        if one.data == "source" and source is None:
            raise SpecError(f"{one.by} is measured on source data ({one.describe()}), and there is none. Give some.")
        if one.data == "source":
            device = next(own.model.parameters()).device
            own.measure(Contents(as_batches(source, 64, device, shuffle=False)), on="source")
        else:
            own.measure(Contents(batches))
    best_block(own, batches, valid or {}, settings.model_copy(update={"lr": 1e-3, "epochs": 5}))


def _losses(
    session: Session, batches: Iterator[Any], rates: list[float], augment: Augment | None, seed: int
) -> list[float]:
    """The loss at each rate, up to a few steps behind where it diverges."""
    generator = torch.Generator(session.device)
    generator.manual_seed(seed)
    waiting: list[Tensor] = []
    losses: list[float] = []
    for number, rate in enumerate(rates, 1):
        session.rate(rate / session.training.lr)
        batch = next(batches)
        loss = session.loss(_CLASSIFICATION, batch if augment is None else augment(batch, generator))
        waiting.append(loss.detach())
        session.backward(loss)
        session.step()
        if number % _LOOK == 0 or number == len(rates):
            losses += torch.stack(waiting).float().tolist()
            waiting.clear()
            if _end(losses, _smooth(losses)) is not None:
                break
    return losses


def _endless(batches: Held | Streamed) -> Iterator[Any]:
    while True:
        for batch in batches.epoch():
            yield batch.content


def _end(losses: Sequence[float], smoothed: Sequence[float]) -> int | None:
    """The number of steps up to which the losses are worth reading; None: all of them."""
    best = math.inf
    for number, (loss, mean) in enumerate(zip(losses, smoothed, strict=True)):
        best = min(best, mean)
        if not math.isfinite(loss):
            return number
        if mean > _DIVERGED * best and mean > smoothed[0]:
            return number + 1
    return None


def _read(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    smoothed = _smooth(losses)
    end = _end(losses, smoothed)
    if end is not None and end < _LOOK:
        raise SpecError(
            f"range test: the loss is not finite, or diverges, from a rate of {rates[end]:.1e} on. Look at the data "
            "and the source model."
        )
    diverged, stop = end is not None, len(losses) if end is None else end
    rates, losses, smoothed = rates[:stop], losses[:stop], smoothed[:stop]
    lowest = _end_of_minimum(losses, smoothed)
    # Up to the minimum, and only where neighbours stand on both sides.
    falls = {i: smoothed[i - 1] - smoothed[i + 1] for i in range(1, max(2, min(lowest, stop - 1)))}
    steepest = rates[max(falls, key=falls.__getitem__)]
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), _SHARE * rates[lowest], steepest, diverged)


def _end_of_minimum(losses: Sequence[float], smoothed: Sequence[float]) -> int:
    """The last step up to which the loss has not risen again from its minimum, beyond what chance makes of it."""
    # Medians: the few steps of the rise itself are no measure of chance.
    spread = 1.5 * statistics.median(abs(loss - mean) for loss, mean in zip(losses, smoothed, strict=True))
    chance = 2 * spread / math.sqrt(2 * math.sqrt(math.pi) * _WIDTH)  # so many steps a Gaussian averages over
    least = min(smoothed)
    at = smoothed.index(least)
    limit = least + max(chance, _FLAT * (smoothed[0] - least))
    while at + 1 < len(smoothed) and smoothed[at + 1] <= limit:
        at += 1
    return at


def _smooth(losses: Sequence[float]) -> list[float]:
    """Averages over neighbouring steps, weighed by a Gaussian; an exploding loss counts as diverged, no more."""
    values = torch.tensor(losses, dtype=torch.float64)
    most = _DIVERGED * values[:_LOOK].nan_to_num(0, 0, 0).mean()
    values = values.nan_to_num(torch.inf, torch.inf, torch.inf).clamp(max=float(most))
    away = torch.arange(len(losses), dtype=torch.float64)
    weights = torch.exp(-((away[:, None] - away) ** 2) / (2 * _WIDTH**2))
    smoothed: list[float] = ((weights @ values) / weights.sum(1)).tolist()
    return smoothed
