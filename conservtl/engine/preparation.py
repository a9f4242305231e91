"""Preparation of a run: arguments checked, data placed, measurements made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from conservtl.adaptation.adaptation import Adaptation
from conservtl.bounds import as_path
from conservtl.engine.batch import Batches, Cut
from conservtl.engine.batching import Contents, as_batches
from conservtl.engine.evaluation import Functions, Holdout
from conservtl.engine.randomness import preserve_rng, seed_all
from conservtl.engine.session import Session
from conservtl.engine.tracing import check_traceable
from conservtl.engine.training import Training, with_found
from conservtl.engine.workers import number_of_workers
from conservtl.errors import SpecError
from conservtl.labels import labels_for_loss, takes_labels
from conservtl.runtime.freezing import keeps_batch_statistics
from conservtl.runtime.preserve import eval_mode, preserve_buffers

__all__ = [
    "Sets",
    "check_arguments",
    "check_compiler",
    "learn_labels",
    "make_measurements",
    "part_generators",
    "place_sets",
    "training_batches",
]

_MEASURED = 64  # examples a batch in measurements, which compute gradients
_DECIDE = ("target", "source")
_RESERVED = {
    "valid": frozenset[str](),
    "watch": frozenset({"epoch", "step", "phase", "loss", "lr", "seconds", "valid"}),
    "path": frozenset({"t", "kept"}),
}


@dataclass(frozen=True)
class Sets:
    """Sets to evaluate on, by name, placed once for all evaluations.

    Args:
        valid: selected on.
        watch: shown only.
        path: evaluated between the starting point and the trained weights.
    """

    valid: Mapping[str, Holdout]
    watch: Mapping[str, Holdout]
    path: Mapping[str, Holdout]


def check_arguments(
    adaptation: Any,
    training: Any,
    sets: Mapping[str, Any],
    *,
    seed: Any = None,
    out: Any = None,
    accelerator: Any = None,
) -> None:
    """Raise unless the arguments of ``fit`` have the right types."""
    if not isinstance(adaptation, Adaptation):
        raise SpecError(f"fit trains the result of adapt(model, source, ...); received {type(adaptation).__name__}.")
    if not isinstance(training, Training):
        raise SpecError(f"training must be a Training, such as Training(epochs=10); received {training!r}.")
    for name, given in sets.items():
        if given is not None and not isinstance(given, Mapping):
            raise SpecError(f"{name} must name its sets: {name}={{'target': data}}; received {type(given).__name__}.")
        _check_names(name, given or {})
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**32):
        raise SpecError(f"seed must be a whole number, 0 to {2**32 - 1}, or None; received {seed!r:.60}.")
    if out is not None:
        as_path(out, "out")
    if accelerator is not None and not hasattr(accelerator, "gradient_accumulation_steps"):
        raise SpecError(
            f"accelerator must be an accelerate.Accelerator, or None for a new one; received "
            f"{type(accelerator).__name__}."
        )


def _check_names(kind: str, given: Mapping[Any, Any]) -> None:
    """Raise unless the sets have names that decide, where they decide, and that no line of the history has."""
    for name in given:
        if not isinstance(name, str):
            raise SpecError(f"{kind}: the names of sets must be text; received {name!r}. Write {str(name)!r}.")
        if name in _RESERVED[kind]:
            raise SpecError(
                f"{kind}: {name!r} is a name of the results themselves ({', '.join(sorted(_RESERVED[kind]))}). Choose "
                "another."
            )
    if kind == "valid" and (other := [name for name in given if name not in _DECIDE]):
        fix = f"Pass it as watch={{{other[0]!r}: data}}" if "target" in given else "Name it: valid={'target': data}"
        raise SpecError(
            f"valid: weights are selected on the sets 'target' and 'source'; received {other[0]!r}. {fix}, or leave "
            "it out."
        )
    if kind == "valid" and given and "target" not in given:
        raise SpecError("valid: weights are selected on the set 'target'; received 'source' alone. Add 'target'.")


def with_sizes(training: Training, saved: Mapping[str, Any]) -> Training:
    """Return the settings of a resumed run: a batch size that is found is the one that was found when it began."""
    if training.batch_size != "auto" or saved.get("global_batch_size") != training.global_batch_size:
        return training
    names = [name for name in ("batch_size", "accumulate", "batch_seconds") if name in saved]
    return with_found(training, {name: saved[name] for name in names})


def training_batches(session: Session, train: Any, together: int | None = None) -> Batches:
    """Return the batches of the training data, of this process's part if there are many.

    ``together`` examples make a step of all processes, as when the run that is resumed began; None: as the settings
    say.
    """
    processes, settings = session.processes, session.training
    size = settings.known_batch_size
    cut: int | Cut = size
    if isinstance(train, IterableDataset) and settings.num_workers not in ("auto", 0):
        raise SpecError(
            f"training.num_workers is {settings.num_workers}, but an IterableDataset divides its examples among "
            "processes itself. Pass DataLoader(dataset, batch_size, num_workers=...)."
        )
    if processes.many or size != (together or size):
        if isinstance(train, DataLoader):
            # Batches are moved one at a time when they are used.
            train = session.accelerator.prepare_data_loader(train, device_placement=False)
        norms = any(keeps_batch_statistics(module) for module in session.adaptation.model.modules())
        cut = Cut(
            together or size * processes.world,
            shuffle=True,
            processes=processes,
            generator=torch.Generator() if processes.many else None,
            least=2 * processes.world if norms else 2,
        )
    return as_batches(
        train,
        cut,
        session.device,
        shuffle=True,
        seconds=settings.batch_seconds,
        step_seconds=settings.step_seconds,
        holding=session.holding,
        workers=number_of_workers(settings.num_workers, session.device),
    )


def part_generators(session: Session, batches: Batches) -> None:
    """Let the order of the data be drawn as in one process, and everything else differently in each process."""
    processes = session.processes
    if not processes.many:
        return
    order = processes.first(torch.get_rng_state())
    if batches.processes.many:
        batches.generators[0].set_state(order)
    if processes.rank > 0:
        seed_all((torch.initial_seed() + processes.rank) % 2**62)


def place_sets(
    session: Session,
    valid: Mapping[str, Any] | None,
    watch: Mapping[str, Any] | None,
    path: Mapping[str, Any] | None,
) -> Sets:
    """Return the sets of ``fit`` as batches, on the device if they fit."""
    processes = session.processes
    cut = Cut(session.training.evaluate_batch_size * processes.world, shuffle=False, processes=processes)

    def placed(sets: Mapping[str, Any] | None) -> dict[str, Holdout]:
        holdouts = {name: data if isinstance(data, Holdout) else Holdout(data) for name, data in (sets or {}).items()}
        return {
            name: replace(
                holdout, data=as_batches(holdout.data, cut, session.device, shuffle=False, holding=session.holding)
            )
            for name, holdout in holdouts.items()
        }

    return Sets(placed(valid), placed(watch), placed(path))


def learn_labels(session: Session, functions: Functions, batches: Batches) -> None:
    """Learn on the first batch which models need its labels: the adapted one for the loss, the source for its outputs.

    Random generators, modes and buffers are restored.
    """
    adaptation = session.adaptation
    model = adaptation.model
    if not takes_labels(model):
        return
    with eval_mode(model), preserve_buffers(model), preserve_rng(batches.generators), torch.no_grad():
        batch = next(batches.epoch(), None)
        if batch is None:
            return
        with session.autocast():
            labels_for_loss(model, batch.content, functions.forward, functions.loss)
            if adaptation.bound.terms.needs_source:
                outputs = functions.forward(model, batch.content)
                adaptation.bound.source_view(batch.content, functions.forward, outputs)


def check_compiler(session: Session, functions: Functions, batches: Batches) -> None:
    """Raise unless the model can be compiled, if the settings ask for that; everything is restored."""
    mode = session.execution.compile
    if not mode:
        return
    model = session.adaptation.model
    with preserve_buffers(model), preserve_rng(batches.generators):
        if (batch := next(batches.epoch(), None)) is None:
            return

        def run(model: nn.Module) -> Any:
            with session.autocast():
                return functions.forward(model, batch.content)

        extended = any(strategy.extends for strategy in session.adaptation.origin.strategies)
        check_traceable(model, run, mode, whole=not (extended or session.adaptation.plan.extensions))


def make_measurements(session: Session, functions: Functions, target: Any, source: Any) -> None:
    """Make the measurements that the plan needs before an optimizer; each process measures on all of the data."""
    adaptation = session.adaptation
    for measure in adaptation.bound.unmeasured():
        if measure.data == "source" and source is None:
            raise SpecError(
                f"{measure.by} is measured on source data ({measure.describe()}), but there is none. Pass "
                "source=data, or measure on the target's."
            )
        data = target if measure.data == "target" else source
        adaptation.measure(
            Contents(as_batches(data, _MEASURED, session.device, shuffle=False)),
            on=measure.data,
            forward=functions.forward,
            loss=functions.loss,
            autocast=session.autocast,
        )
