"""Checks of a spec's source, and of a setting with a plan: what decides, measures or learns has what it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conservtl.batches import to_device
from conservtl.data import Domains, Sequences
from conservtl.engine import Training
from conservtl.engine.kept_weights import deciders
from conservtl.errors import SourceError, SpecError, counted
from conservtl.experiments.spec.spec import Spec
from conservtl.plan.plan import Plan
from conservtl.runtime.preserve import eval_mode, preserve_buffers
from conservtl.tasks.base import Task

__all__ = ["check_densest", "check_headless", "check_labels", "check_proxies", "check_source", "check_validation"]

_DENSEST = 8  # sequences that the loss is tried on


def check_source(spec: Spec) -> None:
    """Raise if neither weights nor data give a source model, or weights are to be read that are not there."""
    if spec.source.data is None and spec.source.weights is None:
        raise SpecError(
            "source: with data null there is nothing to train a source model on. Give source.weights, "
            "or leave source.data at auto."
        )
    named = [name for name in ("key", "prefix", "rename") if getattr(spec.source, name)]
    if named and spec.source.weights is None:
        raise SpecError(
            f"source.{named[0]} says how to read source.weights, which is null. Give the file, or leave it out."
        )


def check_headless(spec: Spec, plan: Plan) -> None:
    """Raise if a measurement or a choice needs answers of a source that has no head."""
    keep = spec.training.keep
    if keep == "harmonic" or (keep == "path" and spec.source.data is not None):
        fix = "Set source.data to null" if keep == "path" else "Set training.keep to target"
        raise SourceError(
            f"training.keep={keep} chooses by the source's score, and source.weights have no head, so the source "
            f"has no labels of its own. {fix}, or give weights with a head."
        )
    if measured := [measure.by for measure in plan.measures if measure.data == "source"]:
        raise SourceError(
            f"{measured[0]} is measured on source data through the source's head, and source.weights have none. "
            f"Measure on the target's data, leave {measured[0]} out, or give weights with a head."
        )


def check_validation(data: Any, domains: Domains, training: Training, plan: Plan) -> None:
    """Raise if a validation score decides something and the part asked for is empty, too few shots to split."""
    if domains.validation is None and data.validation and (names := deciders(training, plan)):
        verb, them = ("choose", "them") if len(names) > 1 else ("chooses", "it")
        raise SpecError(
            f"{' and '.join(names)} {verb} by a validation set, but data.validation={data.validation:g} of "
            f"{counted(data.shots, 'shot', 'leaves')} none. Ask for more shots, or leave {them} out."
        )


def check_labels(train: Any, plan: Plan, *, all_of_them: bool = False) -> None:
    """Raise if examples without labels are to be trained on, and nothing in the plan learns from them.

    Studies compare with methods that leave examples without labels out, so ``all_of_them`` refuses a few too.
    """
    known = getattr(train, "labelled", ())
    bare = len(known) - sum(known)
    if not bare or any(term.unlabelled for term in plan.terms) or (any(known) and not all_of_them):
        return
    raise SpecError(
        f"data.unlabelled: {counted(bare, 'example', 'has', of=len(known))} no labels, and no strategy "
        "learns from such. Set data.unlabelled.pseudo_labels, add the strategy entropy_minimisation, or leave "
        "data.unlabelled out."
    )


def check_proxies(domains: Domains, plan: Plan) -> None:
    """Raise unless the plan compares with the source, if the data makes inputs to compare on."""
    try:
        plan.with_proxies(domains.proxies is not None)
    except SpecError as error:
        raise SpecError(f"data.{error}") from error


def check_densest(task: Task, model: nn.Module, data: Any) -> None:
    """Raise if the loss refuses the sequences with the most labels a second, at their shortest if they change.

    CTC refuses a text that needs more frames than its recording has.
    """
    if not isinstance(data, Sequences):
        return
    batch = data.densest(_DENSEST)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    with eval_mode(model), preserve_buffers(model), torch.no_grad():
        batch = to_device(batch, device)
        task.loss(task.forward(model, batch), batch)
