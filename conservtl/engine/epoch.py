"""One epoch: forward, loss and backward for each batch, a step for each group of batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from conservtl.engine.batch import Batch, Batches, Waiting
from conservtl.engine.batch_size import is_out_of_memory, out_of_memory
from conservtl.engine.buckets import StepShare
from conservtl.engine.divergence import Losses, check_scale, check_weights, gradient_error
from conservtl.engine.evaluation import Functions
from conservtl.engine.execution import ThreadTimer
from conservtl.engine.first_batches import check_gradient, checked
from conservtl.engine.frozen_prefix_cache import FrozenPrefixCache, cache_frozen_prefix
from conservtl.engine.held import Held
from conservtl.engine.lost_workers import Deaths
from conservtl.engine.randomness import generator_states, restore_generators
from conservtl.engine.schedule import schedule_factor
from conservtl.engine.session import Session
from conservtl.engine.snapshot import State
from conservtl.engine.source_output_cache import SourceOutputCache, cache_source_outputs
from conservtl.engine.streamed import Streamed
from conservtl.errors import DataError
from conservtl.layers import named_parameters
from conservtl.losses import counts_positions

__all__ = ["Augment", "Learner"]

Augment = Callable[[Any, torch.Generator], Any]
_Cache = TypeVar("_Cache")


class Learner:
    """Trains an adaptation epoch by epoch.

    Args:
        session: the model, its optimizer and the device.
        functions: forward and loss.
        batches: the training data.
        steps: optimizer steps of the whole run, 0 if unknown.
        augment: (content, generator) -> content, applied to each batch; None: not.
        caches: whether to compute a frozen input side, and the source model's outputs, once if possible.
    """

    def __init__(
        self,
        session: Session,
        functions: Functions,
        batches: Batches,
        steps: int,
        augment: Augment | None,
        caches: bool,
    ) -> None:
        self.session, self.settings = session, session.training
        self.functions, self.batches, self.steps, self.augment = functions, batches, steps, augment
        self.generators = list(batches.generators)
        self.augmenting: torch.Generator | None = None
        if augment is not None:
            self.augmenting = torch.Generator(session.device)
            self.augmenting.manual_seed(int(torch.randint(2**62, ())) + session.processes.rank)
            self.generators.append(self.augmenting)
        if session.proxies is not None:
            self.generators.append(session.proxies.generator)
        caches = caches and session.proxies is None and self.settings.hold != "never"
        self._caches = caches and augment is None and not session.processes.many
        self._prefix: FrozenPrefixCache | None = None
        self._source: SourceOutputCache | None = None
        if caches and augment is None and isinstance(batches, Held):
            needs = session.adaptation.bound.terms.needs_source
            view = partial(session.source_view, functions)
            self._source = _if_it_fits(lambda: cache_source_outputs(needs, view, batches))
        penalties = session.adaptation.plan.penalties
        own = (one.names for one in penalties if not type(one).__module__.startswith("conservtl."))
        self._own_penalties = frozenset(chain.from_iterable(own))
        self._parameters = named_parameters(session.adaptation.model)
        self._phase: int | None = None
        self.ever_cached = self._begun = False
        self.settled: dict[str, Any] = {}  # the generators after the last step, if there are other processes
        self.go_on_from(State())

    def go_on_from(self, state: State) -> None:
        """Continue from a state, new or restored."""
        self.state = state
        if state.epoch and isinstance(self.batches, Streamed):
            self.batches.start_workers()
        self.losses = Losses(state, self.session.device, self.batches, self._parameters)
        timed = self.settings.threads == "auto" and self.session.device.type == "cpu"
        self._timer = ThreadTimer(state.threads, torch.get_num_threads()) if timed else None

    def begin(self, phase: int) -> None:
        """Begin a phase: freeze, scale rates, and compute a frozen input side once if possible."""
        if phase == self._phase:
            return
        if self._timer is not None:
            self._timer.begin(phase)
        if phase != self.session.adaptation.phase:
            self.state.selection.stale = 0
        self.forget()
        self._phase = phase
        self.session.start_phase(phase)
        if self._caches and isinstance(self.batches, Held):
            adaptation, model, batches = self.session.adaptation, self.session.eager, self.batches
            run = partial(self.functions.forward, model)
            compiled = bool(self.session.execution.compile)
            self._prefix = _if_it_fits(
                lambda: cache_frozen_prefix(
                    model, run, adaptation.layers, adaptation.frozen, batches, compiled=compiled
                )
            )
            self.ever_cached |= self._prefix is not None

    def epoch(self) -> Generator[None]:
        """Run the remaining steps of an epoch; yield after each, when the state is complete.

        Raises:
            TrainingDivergedError: a loss or a weight is not finite.
            DataError: there are no batches.
        """
        state = self.state
        self.session.train()
        self._settle()
        steps = self._steps_left()
        first = next(steps, None)
        with Deaths() as deaths:
            for group in chain([] if first is None else [first], steps):
                deaths.running = True
                self._step(group)
                deaths.running = False
                if deaths.heard:
                    deaths.tell()
                self._settle()
                yield
        if not state.batch:
            raise DataError(
                "train: the data gave no batches. Pass a non-empty iterable that can be iterated repeatedly."
            )
        self._begun = False
        self.check()

    def states(self) -> dict[str, Any]:
        """Return the generators' states to go on with: an epoch without a step yet draws its order again."""
        return self.state.drawn if self._begun and not self.state.batch else generator_states(self.generators)

    def check(self) -> None:
        """Raise unless all losses and weights are finite.

        Raises:
            TrainingDivergedError: a loss or a weight is not finite, or fp16 makes no step any more.
        """
        self.losses.look()
        check_weights(self._parameters, self.state.step, self._own_penalties)
        check_scale(self.session.accelerator.scaler, self.state.step)

    def _step(self, group: list[Waiting]) -> None:
        """Make the step of a group of batches."""
        state, session, size = self.state, self.session, len(group)
        session.rate(schedule_factor(self.settings, state.step, self.steps))
        if self._timer is None:
            self._compute(group, [])
        else:
            with self._timer.step() as sizes:
                self._compute(group, sizes)
        state.batch += size
        state.step += 1
        if state.step == 1 and self._own_penalties:  # their gradient at w = w0, the only step that begins there
            self.check()

    def _compute(self, group: list[Waiting], sizes: list[int]) -> None:
        """Make the gradients of a group of batches and the optimizer's step; add the sizes of the batches to a list."""
        session, size = self.session, len(group)
        for number in range(1, size + 1):
            batch = group.pop(0)()
            sizes.append(batch.size)
            if number == size:
                self._backward(batch, number, size)
            else:
                with session.no_sync():
                    self._backward(batch, number, size)
            del batch  # before the next is put on the device
        try:
            session.step(strict=True)
        except RuntimeError as error:
            named = gradient_error(error, self._parameters, self.state.step + 1)
            if named is None:
                raise
            raise named from error

    def _settle(self) -> None:
        """Note the generators' states between two steps: a step that a lost process breaks off is made again."""
        if self.session.processes.many:
            self.settled = generator_states(self.generators)

    def forget(self) -> None:
        """Remove the cache of the frozen input side."""
        if self._prefix is not None:
            self._prefix.remove()
            self._prefix = None

    def _steps_left(self) -> Iterator[list[Waiting]]:
        """Return the batches of each remaining step; in a resumed epoch, draw its order from the saved generators."""
        state = self.state
        if not state.batch:
            state.drawn, self._begun = generator_states(self.generators), True
            return self.batches.steps(self.settings.accumulate)
        current = generator_states(self.generators)
        restore_generators(state.drawn, self.generators)
        remaining = self.batches.steps(self.settings.accumulate, skip=state.batch)
        restore_generators(current, self.generators)
        return remaining

    def _backward(self, batch: Batch, number: int, size: int) -> None:
        """Add the gradients of the ``number``-th batch of a group of ``size``."""
        first = self.state.step == 0 and number == 1
        failed = None
        try:
            content = batch.content
            others = None if self.session.proxies is None else self.session.proxies(content)
            if self.augment is not None and self.augmenting is not None:
                content = self.augment(content, self.augmenting)
            functions = checked(self.functions, self.batches) if first else self.functions
            loss = self._loss(batch, content, functions, others)
            self.losses.add(loss, batch, self.state.batch + number, self.state.step + 1, content)
            if first:
                self.losses.look()
                check_gradient(loss, self.session.adaptation.model)
            if batch.of_step is not None:
                loss = loss * self._factors(batch.of_step)[0]
            self.session.backward(loss if size == 1 or batch.of_step is not None else loss / size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = str(error).partition("\n")[0].rstrip(".")
        if failed is not None:  # outside the handler, which keeps the step's tensors
            raise out_of_memory(self.session, self.functions, batch.content, failed)

    def _loss(self, batch: Batch, content: Any, functions: Functions, others: Any) -> Tensor:
        source = self._source.of(batch) if self._source is not None else None
        share = None if batch.together is None else batch.share
        terms = 1.0 if batch.of_step is None else self._factors(batch.of_step)[1]
        if self._prefix is None:
            return self.session.loss(functions, content, source, share, terms, others)
        with self._prefix.serving(batch.index):
            return self.session.loss(functions, content, source, share, terms)

    def _factors(self, share: StepShare) -> tuple[float, float]:
        """Return the factor on a batch's loss in a step of unequal batches, and that on the terms in the loss."""
        factor = share.labels if counts_positions(self.functions.loss) else share.examples
        return factor, share.examples / factor if factor else 1.0


def _if_it_fits(make: Callable[[], _Cache | None]) -> _Cache | None:
    """Return a cache; None if memory runs out while it is made, since training needs less."""
    try:
        return make()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
