"""The labels of the source model's outputs: said by the spec, an earlier run or the data, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.batches import map_tensors
from conservtl.data import Data, Domains, Examples, length_of
from conservtl.data.sequences import Sequences
from conservtl.data.shots import UpTo, taken_text
from conservtl.errors import DataError, SpecError, counted, listed, plural
from conservtl.plan.plan import Plan
from conservtl.runtime.preserve import eval_mode, preserve_buffers
from conservtl.tasks.base import Task

__all__ = [
    "check_outputs",
    "check_reader",
    "check_shots",
    "classes_of",
    "data_line",
    "labels_used",
    "shots_note",
    "with_source_labels",
]


def with_source_labels(
    task: Task, domains: Domains, labels: Sequence[str], *, trains: bool, field: str, fix: str
) -> Domains:
    """Return the domains with the source's examples numbered by these labels, its model's outputs in order.

    A source model that is trained on the data needs examples of every label. ``field`` says where the labels stand, and
    ``fix`` how to mend labels that are not listed.

    Raises:
        SpecError: a label stands twice, the data has a label that is not listed, or one is listed to be trained that
            the data does not have.
    """
    labels, old = tuple(labels), domains.source_labels
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise SpecError(f"{field}: each label must be listed once; received {listed(twice)} twice. Remove one.")
    parts = {"source_train": domains.source_train, "source_test": domains.source_test}
    if all(part is None for part in parts.values()) or labels == old:
        return replace(domains, source_labels=labels)
    if unknown := [old[number] for number in labels_used(parts.values(), len(old)) if old[number] not in labels]:
        raise SpecError(
            f"{field} must list every label of the source's data, to number its examples; received {listed(labels)}, "
            f"without {listed(unknown)}. {fix}"
        )
    if trains and (extra := [label for label in labels if label not in old]):
        raise SpecError(
            f"{field} must be labels of the source's data, because a source model is trained on it; received "
            f"{listed(extra)}, and the data has {listed(old)}. Remove them, or give source.weights."
        )
    places = {label: place for place, label in enumerate(labels)}
    numbers = [places.get(label, -1) for label in old]
    if numbers == list(range(len(numbers))):  # further labels behind them
        return replace(domains, source_labels=labels)
    new: dict[str, Any] = {
        name: None if part is None else task.renumbered(part, numbers) for name, part in parts.items()
    }
    return replace(domains, source_labels=labels, **new)


def labels_used(parts: Iterable[Data | None], count: int) -> list[int]:
    """Return the labels that data has, by their places in a list of ``count``; all of them where it is not known."""
    found: set[int] = set()
    for part in parts:
        if isinstance(part, Sequences):
            found.update(*(one.tolist() for one in part.labels))
        elif (classes := classes_of(part)) is not None:
            found.update(classes[classes >= 0].tolist())
        elif part is not None:
            return list(range(count))
    return sorted(found)


def check_reader(task: Task, model: nn.Module, plan: Plan) -> None:
    """Raise if a term or measurement runs a model on labels that it reads, as a decoder does, and are not its own."""
    names = [term.by for term in plan.terms if term.source]
    names += [measure.by for measure in plan.measures if measure.data == "source"]
    if names and task.reads_labels(model):
        raise SpecError(
            f"{names[0]} runs a model on texts of the other domain, which a decoder reads, so both must have the same "
            f"tokens in the same order; they differ. Keep the source's tokens, or leave {names[0]} out."
        )


def check_shots(task: Task, domains: Domains, names: Mapping[str, str] | None = None) -> None:
    """Raise unless each set holds examples, and the classes of those in memory are positions in its list of labels."""
    for name in ("shots", "validation", "target_test", "source_train", "source_test"):
        data = getattr(domains, name)
        subject = f"task {task.name!r}: {name}" if names is None else names[name]
        if data is not None and length_of(data) == 0:
            fix = "at least one" if name in ("shots", "target_test") else "at least one, or None"
            give = "Let load return" if names is None else "Give"
            raise DataError(f"{subject} must hold examples; received none. {give} {fix}.")
        if not task.has_classes:
            continue
        labels = domains.source_labels if name.startswith("source") else domains.labels
        classes = classes_of(data)
        if classes is not None and labels and classes.numel() and int(classes.max()) >= len(labels):
            raise DataError(
                f"{subject}: the labels must be positions in a list of {counted(len(labels), 'label')} "
                f"({listed(labels)}); received {int(classes.max())}. Number the examples by that list."
            )


def none_held_out(data: Any) -> str:
    """Return that nothing of a source was held out, with the fields of the section ``data`` that decide it."""
    fields = [f"data.{name}" for name in ("held_out", "held_out_takes", "held_out_speakers") if hasattr(data, name)]
    return "nothing of it was held out" + (f" ({', '.join(fields)})" if fields else "")


def data_line(task: Task, domains: Domains, data: Any) -> str:
    """Return the classes of the target, and how many examples there are to adapt with and to test on."""

    def text(*names: str) -> str:
        parts = [part for name in names if (part := getattr(domains, name)) is not None]
        found = [classes_of(part) for part in parts] if task.has_classes else [None]
        said = counted(sum(map(length_of, parts)), task.example)
        if any(classes is None for classes in found):
            return said
        labels = domains.source_labels if names == ("source_test",) else domains.labels
        classes = torch.cat([one for one in found if one is not None])
        return f"{said} ({taken_text(classes[classes >= 0].bincount(minlength=len(labels)).tolist())} a class)"

    line = f"{text('shots', 'validation')} to adapt with, {text('target_test')} to test on"
    if domains.source_test is not None:
        line += f", {text('source_test')} of the source"
    elif domains.source_train is not None:
        line += ", none of the source: " + none_held_out(data)
    if not task.has_classes:
        return line
    return f"{counted(len(domains.labels), 'class')}, {listed(domains.labels)}: {line}"


def shots_note(task: Task, domains: Domains, taken: Mapping[str, int] | None, shots: Any) -> tuple[str, ...]:
    """Say how many examples of each class are taken, if a spec gives no number, and how many have no labels."""
    sizes = domains.sizes
    if bare := sizes.get("unlabelled"):
        tested = counted(sizes["target_test"], task.example)
        return (f"{counted(sizes['shots'], task.example)} with labels and {bare:,} without; {tested} to test on",)
    if isinstance(shots, int) or not taken:
        return ()
    text = f"{taken_text(taken.values())} {plural(task.example)} of each class are taken, {sum(taken.values())} in all"
    if isinstance(shots, UpTo) and (few := [label for label, count in taken.items() if count < shots.up_to]):
        text += f"; fewer than {shots.up_to} of {listed(few)}"
    return (text,)


def check_outputs(task: Task, model: nn.Module, example: Any, labels: int) -> None:
    """Raise unless a model's outputs are what the task takes, one for each label; runs it once on the example."""
    if not (task.has_classes or task.takes):
        return
    device = next(model.parameters()).device
    inputs = map_tensors(example, lambda tensor: tensor.to(device))
    name = type(model).__name__
    with torch.no_grad(), torch.random.fork_rng(), eval_mode(model), preserve_buffers(model):
        try:
            outputs = task.forward(model, inputs if isinstance(inputs, Mapping) else (inputs,))
        except TypeError as error:
            if not task.takes:
                raise
            raise SpecError(f"model: {name} must {task.takes}; it raises: {error}. Choose another model.") from error
    if (fault := task.fault(outputs, labels)) is not None:
        raise SpecError(f"model: {name} {fault}")


def classes_of(data: Data | None) -> Tensor | None:
    """Return the class of each example, (N,), without reading inputs; None where it is not known."""
    if isinstance(data, Examples):
        labels: Any = data.labels
    elif isinstance(data, Mapping):
        labels = data.get("labels")
    else:
        labels = getattr(data, "labels", None)
    return labels if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() else None
