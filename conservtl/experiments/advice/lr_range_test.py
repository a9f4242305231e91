"""The range test: training of a copy while the learning rate grows, until the loss diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine import Training, best_block
from conservtl.engine.batch import Batches
from conservtl.engine.batch_size import find_batch_size
from conservtl.engine.batching import as_batches
from conservtl.engine.epoch import Augment
from conservtl.engine.evaluation import Functions
from conservtl.engine.first_batches import checked
from conservtl.engine.mixing import with_mixing
from conservtl.engine.open_session import open_session
from conservtl.engine.optimizer import choose_optimizer
from conservtl.engine.preparation import check_arguments, make_measurements
from conservtl.engine.proxies import Proxies, check_proxies
from conservtl.engine.randomness import preserve_rng, seed_all
from conservtl.engine.session import Session
from conservtl.errors import DataError, SpecError
from conservtl.experiments.advice.range_curve import RangeTest, diverges, read_curve
from conservtl.experiments.run.evaluation_sets import sets_to_select_on
from conservtl.experiments.run.source_training import prepare_source
from conservtl.experiments.spec.spec import Spec
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers.copying import deep_copy
from conservtl.losses import check_trained
from conservtl.plan.plan import Plan

__all__ = ["RangeTest", "lr_find", "lr_find_for"]

_FEWEST, _SEEDS = 10, 2**32
_LOOK = 10  # steps between two checks of the losses, which wait for the device


def lr_find_for(spec: Spec, *, steps: int = 100) -> RangeTest:
    """Run the range test of a spec's strategies on its shots; the spec's own rate does not matter.

    Raises:
        DataError: the data is missing or contradicts the spec.
        SpecError: nothing is trained, or the loss is not finite at any rate.
    """
    setting, source = prepare_source(spec)
    adaptation = setting.adaptation(source.with_notes())
    return lr_find(
        adaptation,
        setting.domains.shots,
        setting.selecting(spec.training),
        valid=sets_to_select_on(setting, source, both=False),
        steps=steps,
        **setting.fit_arguments(adaptation.plan),
    )


def lr_find(
    adaptation: Adaptation,
    train: Any,
    training: Training | None = None,
    *,
    valid: dict[str, Any] | None = None,
    forward: Forward = plain_forward,
    loss: Loss = cross_entropy,
    metrics: Metrics = accuracy,
    source: Any = None,
    augment: Augment | None = None,
    proxies: Augment | None = None,
    optimizer: Any = None,
    seed: int = 0,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    r"""Train a copy while the rate rises geometrically, until the loss diverges; the adaptation is unchanged.

    .. math:: \eta_t = \eta_0 (\eta_1 / \eta_0)^{t / (T - 1)}

    The copy is trained as ``fit`` would train in the plan's last phase: with the plan's ratios, pull and terms, and
    the settings' optimizer, precision and batch norms, but without their schedule. Two rates are read off the losses,
    smoothed over neighbouring steps without a lag: the rate where they fall fastest, and a tenth of the rate where
    they are lowest. The second is suggested: on few examples the first comes early, when a model that begins near its
    goal has learned the easy examples only.

    Args:
        adaptation: the result of ``adapt``.
        train: as for ``fit``.
        training: settings; epochs, rate and schedule do not matter.
        valid: as for ``fit``, for strategies that choose before training.
        forward: as for ``fit``.
        loss: as for ``fit``.
        metrics: as for ``fit``.
        source: source data, for the plan's measurements on it.
        augment: as for ``fit``.
        proxies: as for ``fit``.
        optimizer: as for ``fit``.
        seed: seeds the order of batches and the model's own randomness.
        lowest: the first rate.
        highest: the last rate; lower if a decoupled pull would overshoot the source before it.
        steps: number of optimizer steps.

    Raises:
        SpecError: nothing is trained, rates that do not rise, a strategy that gives absolute rates, or a loss that is
            not finite from the first steps on.

    Returns:
        The curve and its ``suggestion``; a notebook shows the figure.

    Reference:
        Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.

    Example:
        >>> import torch, conservtl as ctl
        >>> adaptation = ctl.adapt(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), [ctl.L2SP(alpha=0.1)])
        >>> found = ctl.lr_find(adaptation, (torch.randn(32, 4), torch.arange(32) % 2))
        >>> training = ctl.Training(lr=found.suggestion)
    """
    _check_range(lowest, highest, steps, seed)
    if not isinstance(adaptation, Adaptation):
        raise SpecError(
            f"range test: adaptation must be what adapt returns; received {type(adaptation).__name__}. Call "
            "lr_find(ctl.adapt(model, source), train)."
        )
    if training is not None and not isinstance(training, Training):
        raise SpecError(
            f"training must be a ctl.Training; received {type(training).__name__}. Write ctl.Training(epochs=...)."
        )
    check_arguments(adaptation, training or Training(), {"valid": valid})
    if not adaptation.plan.trained:
        raise SpecError("range test: the plan trains nothing, so there is no rate to find. Train a layer.")
    highest = _reach(adaptation.plan, highest)
    given = training or adaptation.training or Training()
    settings = given.model_copy(update={"lr": highest, "schedule": "constant", "warmup": 0.0})
    made = choose_optimizer(settings, optimizer, recommended=training is None)
    check_proxies(proxies)
    trained = deep_copy(adaptation)
    trained.bound.plan = trained.plan.with_proxies(proxies is not None)
    functions = Functions(forward, loss, metrics)
    check_trained(functions.loss, adaptation.model.parameters())
    with preserve_rng(), open_session(trained, settings, made=made) as session:
        seed_all(seed)
        if proxies is not None:
            session.proxies = Proxies(proxies, session.device, session.processes)
        batches = as_batches(
            train, settings.known_batch_size, session.device, shuffle=True, seconds=settings.batch_seconds
        )
        make_measurements(session, functions, batches, source)
        trial = session.training.model_copy(update={"lr": 1e-3, "epochs": 5})
        best_block(trained, batches, valid or {}, trial, **vars(functions), proxies=proxies)
        batches = find_batch_size(session, functions, train, batches)
        session.begin()
        session.start_phase(len(trained.plan.phases) - 1)
        rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
        mixed = with_mixing(session, functions, batches, augment)
        first = checked(functions, batches)
        losses = _losses(session, [first, functions], _endless(batches), rates, mixed, seed)
    return read_curve(rates, losses)


def _check_range(lowest: Any, highest: Any, steps: Any, seed: Any) -> None:
    """Raise unless the rates rise over enough steps."""
    rates = [rate for rate in (lowest, highest) if isinstance(rate, (int, float)) and not isinstance(rate, bool)]
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if len(rates) < 2 or not 0 < lowest < highest < math.inf or not whole or steps < _FEWEST:
        raise SpecError(
            f"range test: finite rates must rise from above 0, in {_FEWEST} steps at least; received {lowest!r:.40} to "
            f"{highest!r:.40} in {steps!r:.40}. Choose others."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise SpecError(f"seed must be a whole number, 0 to {_SEEDS - 1}; received {seed!r:.60}. Give one.")


def _reach(plan: Plan, highest: float) -> float:
    """Return the highest rate at which no decoupled pull overshoots the source."""
    largest = max(phase.scale for phase in plan.phases)
    for name in plan.trained:
        row = plan[name]
        if row.lr is not None:
            raise SpecError(
                f"range test: {row.chosen['rate'].by} gives {name!r} the absolute rate {row.lr:g}, which training.lr "
                "does not change. Give ratios instead: leave its lr, source and fresh out."
            )
        strength = plan.strength_of(name, "decoupled") * row.scale * largest
        if strength * highest > 1:
            highest = 1 / strength
    return highest


def _losses(
    session: Session,
    functions: Sequence[Functions],
    batches: Iterator[Any],
    rates: list[float],
    augment: Augment | None,
    seed: int,
) -> list[float]:
    """Return the loss at each rate, up to a few steps after it diverges.

    ``functions`` are those of the first step and of the others.
    """
    generator = torch.Generator(session.device)
    generator.manual_seed(seed)
    waiting: list[Tensor] = []
    losses: list[float] = []
    for number, rate in enumerate(rates, 1):
        session.rate(rate / session.training.lr)
        batch = next(batches)
        others = None if session.proxies is None else session.proxies(batch)
        content = batch if augment is None else augment(batch, generator)
        loss = session.loss(functions[number > 1], content, others=others)
        waiting.append(loss.detach())
        session.backward(loss)
        session.step()
        if number % _LOOK == 0 or number == len(rates):
            losses += torch.stack(waiting).float().tolist()
            waiting.clear()
            if diverges(losses):
                break
    return losses


def _endless(batches: Batches) -> Iterator[Any]:
    while True:
        batch = None
        for batch in batches.epoch():
            yield batch.content
        if batch is None:
            raise DataError("range test: there must be examples to train on; received none. Give at least one batch.")
