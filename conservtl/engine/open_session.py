"""Sessions from beginning to end: the model's methods and modes, and the process's settings, are left as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.compat import ACCELERATE_ATTRIBUTES, prepared_objects
from conservtl.engine.accelerators import checked_accelerator, own_accelerator
from conservtl.engine.execution import in_tf32
from conservtl.engine.layout import channels_last
from conservtl.engine.optimizer import Made
from conservtl.engine.processes import names_lost
from conservtl.engine.randomness import determinism
from conservtl.engine.session import Session
from conservtl.engine.source_precision import source_in
from conservtl.engine.threads import cpu_threads
from conservtl.engine.training import Training
from conservtl.runtime.preserve import preserve_modes

__all__ = ["open_session"]


@contextmanager
def open_session(
    adaptation: Adaptation, training: Training, accelerator: Any = None, made: Made | None = None
) -> Iterator[Session]:
    """Open a session; restore the model's methods and modes, and the settings of the process, at its end."""
    machine = own_accelerator(training) if accelerator is None else nullcontext(checked_accelerator(accelerator))
    with (
        machine as ready,
        determinism(training.deterministic),
        cpu_threads(None if training.threads == "auto" else training.threads),
        _preserve(adaptation, ready),
        adaptation.bound.endings.in_good_hands(),
        adaptation.bound.norms_left_to_loop(),
    ):
        session = Session(adaptation, training, ready, made)
        runner = adaptation.bound.terms.source_model
        models = [adaptation.model] if runner is None else [adaptation.model, runner.model]
        try:
            with (
                source_in(training, session.precision, runner, adaptation.plan),
                channels_last(models, active=session.execution.channels_last),
                in_tf32(session.execution.tf32),
                names_lost(session.processes),
            ):
                yield session
        finally:
            session.recomputation.close()
            adaptation.model.zero_grad()


@contextmanager
def _preserve(adaptation: Adaptation, accelerator: Any) -> Iterator[None]:
    """Restore the model's ``forward`` and modes, and the accelerator's lists of prepared objects, after the block."""
    model = adaptation.model
    names = ("forward", *ACCELERATE_ATTRIBUTES)
    attributes = {name: model.__dict__[name] for name in names if name in model.__dict__}
    prepared = [(list(objects), objects) for objects in prepared_objects(accelerator)]
    try:
        with preserve_modes(model):
            yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(attributes)
        for before, now in prepared:
            now[:] = before
        adaptation.keep_frozen()
