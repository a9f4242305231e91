"""Model, source and functions tried once, on a few examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from conservtl.batches import map_tensors, tensors_of, to_device
from conservtl.data import Data, first_batch, length_of
from conservtl.engine import Training
from conservtl.engine.criterion import KNOWN_DIRECTIONS, Criterion, check_metric
from conservtl.engine.evaluation import Functions, check_metrics
from conservtl.errors import DataError, SourceError, SpecError
from conservtl.experiments.own.options import ProblemOptions
from conservtl.functions import cross_entropy, labels_of, logits_of
from conservtl.labels import labels_for_loss
from conservtl.layers import named_parameters
from conservtl.layers.copying import deep_copy
from conservtl.plan.plan import Plan
from conservtl.report.text.metrics import metric_named
from conservtl.runtime.preserve import eval_mode, preserve_buffers
from conservtl.runtime.source_model import build_source_model
from conservtl.source.itself import Itself, own_values
from conservtl.source.positions import resample_positions
from conservtl.source.read import Source, SourceLike, read_source
from conservtl.tasks.headline import Headline

__all__ = ["declared", "headline", "labels_for", "outputs_of", "read_given", "source_model", "tried", "try_sets"]


def read_given(model: nn.Module, source: SourceLike | Itself, options: ProblemOptions) -> tuple[Source, dict[str, str]]:
    """Return the source, read once, and parameter -> reason of those that it says are missing."""
    names = {name: options.get(name) for name in ("key", "prefix", "rename")}
    if not isinstance(source, Itself):
        read = read_source(source, **names)  # type: ignore[arg-type]
        return (read if read.module is None else replace(read_source(deep_copy(read.module)), notes=read.notes)), {}
    if any(names.values()):
        raise SpecError("key, prefix and rename say how to read a source; the model itself is none. Leave them out.")
    read, missing = own_values(model, source)
    kept = {name: tensor.detach().clone() for name, tensor in read.tensors.items()}
    return replace(read, tensors=kept, module=None), missing


def declared(fresh: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return glob -> reason of what the caller declares fresh."""
    globs = (fresh,) if isinstance(fresh, str) else fresh
    return dict(fresh) if isinstance(fresh, Mapping) else dict.fromkeys(globs, "declared fresh by fresh=[...]")


def source_model(model: nn.Module, read: Source, plan: Plan, fresh: Mapping[str, str]) -> nn.Module:
    """Return a model with the source's values, those of a head of another shape included."""
    matched = read.matched(model)
    wanted = {name: parameter for name, parameter in named_parameters(model).items() if name not in plan.possible_head}
    resampled, _ = resample_positions(model, matched.tensors, wanted)
    names = [row.name for row in plan.rows if row.origin == "source" and not row.fresh and row.name not in fresh]
    built = build_source_model(model, matched.as_model_has(resampled), names)
    if not isinstance(built, nn.Module):
        raise SourceError(
            "source: studies copy a source model, and a model with an adapter of PEFT shares its own. Pass the model "
            "without the adapter."
        )
    return built


def tried(model: nn.Module, functions: Functions, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model's outputs for a batch, and its metrics."""
    outputs = outputs_of(model, functions, batch)
    try:
        if functions.loss is cross_entropy:
            labels_of(batch)
        metrics = functions.metrics(outputs, to_device(batch, next(model.parameters()).device))
    except LookupError as error:
        raise DataError(
            f"train: an example must be (inputs, labels), or a dictionary with 'labels', for this loss and metrics; "
            f"received {type(batch).__name__} of {len(batch)}. Give labels, or loss and metrics of your own."
        ) from error
    check_metrics(metrics)
    return map_tensors(outputs, lambda tensor: tensor.cpu()), dict(metrics)


def try_sets(model: nn.Module, functions: Functions, sets: Mapping[str, Data], tests: Mapping[str, Any]) -> None:
    """Raise unless the model takes the first examples of each set; the message names the set."""
    named = {f"train, target {target!r}": data for target, data in sets.items()}
    named |= {f"held_out['target'], {target!r}": data for target, data in tests["target"].items()}
    named |= {f"valid, {target!r}": data for target, data in tests["valid"].items()}
    named |= {"held_out['source']": tests["source"], "source_data": tests["source_train"]}
    for name, data in named.items():
        data = data.dataset if isinstance(data, DataLoader) else data  # noqa: PLW2901
        if data is None or length_of(data) == 0:
            continue
        batch = first_batch(data, 2)
        try:
            outputs_of(model, functions, batch)
        except (RuntimeError, LookupError, TypeError) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(batch))
            raise DataError(
                f"{name}: the model must take the examples; for tensors of shape {shapes} it raises "
                f"{type(error).__name__}: {str(error).splitlines()[0]:.200}. Prepare all sets alike."
            ) from error


@torch.no_grad()
def outputs_of(model: nn.Module, functions: Functions, batch: Any) -> Any:
    """Return a model's outputs for a batch, in eval mode; the model stays as it is."""
    with eval_mode(model), preserve_buffers(model):
        moved = to_device(batch, next(model.parameters()).device)
        labels_for_loss(model, moved, functions.forward, functions.loss)
        return functions.forward(model, moved)


def labels_for(
    given: tuple[Sequence[Any], Sequence[Any]] | None, outputs: Any, theirs: Any, *, classes: bool, own_head: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels of the model's and of the source model's outputs; equal if one head serves both."""
    if given is not None:
        return tuple(map(str, given[0])), tuple(map(str, given[1]))
    count = logits_of(outputs).shape[1] if classes else 1
    labels = tuple(map(str, range(count)))
    if not own_head:
        return labels, labels
    count = logits_of(theirs).shape[1] if classes and theirs is not None else 1
    return labels, tuple(f"source {number}" for number in range(count))


def headline(training: Training | None, metrics: Mapping[str, Any]) -> Headline:
    """Return the metric that runs are judged by: the one to select on, else the accuracy, else the only one.

    Raises:
        SpecError: it is not measured, or there are several and none is named.
    """
    chosen = None if training is None else training.select
    if chosen is None:
        name = "accuracy" if "accuracy" in metrics else "loss" if not metrics else next(iter(metrics))
        if name not in KNOWN_DIRECTIONS or (len(metrics) > 1 and name != "accuracy"):
            raise SpecError(
                f"training.select: of the metrics, {', '.join(metrics)}, it must be known which one runs are judged "
                "by, and which values are better. Write "
                f"Training(select={{'metric': {name!r}, 'direction': 'higher'}}), or 'lower'."
            )
        chosen = Criterion.model_validate(name)
    check_metric(chosen, [*metrics, "loss"], "target")
    shown = metric_named(chosen.metric)
    return Headline(chosen.metric, chosen.direction, share=shown.share, text=shown.name)
