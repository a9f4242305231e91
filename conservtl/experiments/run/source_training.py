"""The source model: read from given weights, or trained on the source data and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.prepare import adapt
from conservtl.data import Data
from conservtl.engine.checkpoint import Checkpoints
from conservtl.engine.processes import current
from conservtl.errors import SourceError, SpecError, agreeing, counted, listed
from conservtl.experiments.run.bundle_header import extend_model
from conservtl.experiments.run.setting import Setting, prepare
from conservtl.experiments.run.source_cache import cache_entry
from conservtl.experiments.spec.spec import Spec
from conservtl.source.coverage import unused_note
from conservtl.source.itself import itself
from conservtl.source.kinds import check_kinds
from conservtl.source.positions import resample_positions
from conservtl.source.read import Source, own_tensors, read_source, tensor_numbers
from conservtl.source.renaming import best_fit
from conservtl.tasks.own_network import NetworkSection

__all__ = ["SourceModel", "obtain_source", "prepare_source", "source_data"]

_FORMAT = 2  # of the cache's keys


@dataclass(frozen=True)
class SourceModel:
    """A source model and its origin.

    Args:
        model: in eval mode, on the CPU.
        origin: "given", "trained" or "cached".
        notes: remarks on the weights that were read.
        run: the header of the run that saved the weights, or None.
        read: the source as it was read, if that is not the model alone.
        headless: whether the weights have no head; that of the model is then random, and not among those of ``read``.
    """

    model: nn.Module
    origin: str
    notes: tuple[str, ...] = ()
    run: Mapping[str, Any] | None = None
    read: Source | None = None
    headless: bool = False

    def with_notes(self) -> Source:
        """Return the model as a source whose notes reach the plan, with the header of the run that saved it."""
        if self.read is not None:
            return self.read
        return replace(read_source(self.model), notes=self.notes, run=self.run)


def prepare_source(
    spec: Spec, *, progress: bool = False, show: Callable[[Sequence[str]], None] | None = None
) -> tuple[Setting, SourceModel]:
    """Read the data and the source model that a spec names.

    Args:
        spec: names them.
        progress: show bars.
        show: called with the lines on the data, before a source model is trained and with all of them at the end.
    """
    setting = prepare(spec)
    if show is not None and spec.source.weights is None:
        show(setting.data_notes)
    source = obtain_source(setting, progress=progress)
    setting = setting.without_source_head() if source.headless else setting.completed(source.model)
    if show is not None:
        show(setting.data_notes)
    return setting, source


def obtain_source(setting: Setting, *, progress: bool = False) -> SourceModel:
    """Load the weights that the spec gives, or else train a source model once and cache it.

    Raises:
        SourceError: the weights do not fit the model.
        SpecError: neither weights nor source data are given.
        WriteError: the cache cannot be written to.
    """
    spec = setting.spec
    if spec.held is not None:
        held: SourceModel = spec.held.source()
        return held
    if spec.source.weights is not None:
        return _given(setting, spec.source.weights)
    data = source_data(setting)
    model = setting.model(len(setting.domains.source_labels))
    with cache_entry(spec.source.cache, f"{spec.task}-{_key(setting, data)}") as entry:
        processes = current()
        cached = entry.load() if processes.main else None  # the others wait for the lock that the first holds
        if processes.first(cached is not None):
            model.load_state_dict(cached or entry.load() or {})
            return SourceModel(model.eval(), "cached")
        setting.fit(
            adapt(model, itself(missing=[]), example=setting.example, layers=spec.layers),
            data,
            training=spec.source.training,
            augment=setting.task.augmented(setting.domains.source_augmentation),
            progress=progress,
            out=entry.unfinished,
            resume=processes.first(Checkpoints(entry.unfinished).exist()),
        )
        model = model.cpu().eval()
        entry.store(model.state_dict())
    return SourceModel(model, "trained")


def source_data(setting: Setting) -> Data:
    """Return the examples that a source model is trained on."""
    if (data := setting.domains.source_train) is not None:
        return data
    fields = [f"data.{name}" for name in ("source_root", "corruption") if hasattr(setting.spec.data, name)]
    raise SpecError(
        "source: the data names no source to train a model on. Give "
        f"{' or '.join(('source.weights', *(fields or ['data with a source part'])))}."
    )


def _given(setting: Setting, given: Path | str) -> SourceModel:
    section = setting.spec.source
    weights = f"source.weights {section.shown!r}"
    outputs = len(setting.domains.source_labels or setting.domains.labels)
    read = read_source(given, key=section.key, prefix=section.prefix, rename=section.rename)
    model = setting.model(outputs)
    head = setting.head(model)
    matched = read.matched(model)
    needed = own_tensors(model)
    check_kinds(matched.tensors, needed, matched.where)
    matched.check_finite()
    tensors = _named(model, matched.tensors)
    if head[0] in tensors and len(tensors[head[0]]) != len(
        needed[head[0]]
    ):  # a head's weight has a row for each output
        labels, outputs = setting.domains.source_labels, len(tensors[head[0]])
        if labels:
            raise SourceError(
                f"{weights} must have an output for each label of the source; its head "
                f"{head[0]!r} has {outputs}, and there {agreeing(len(labels), 'is')} {counted(len(labels), 'label')} "
                f"({listed(labels)}). List the labels of its outputs, in order, in source.labels."
            )
        model = setting.model(outputs)
        needed = own_tensors(model)
    if (names := setting.given) is not None and names != setting.domains.source_labels:
        order = [names.index(label) for label in setting.domains.source_labels]
        tensors |= {name: tensors[name][order] for name in head if name in tensors}
    if matched.run is not None:
        identities = extend_model(model, matched.run)
        needed = own_tensors(model)
        tensors = identities | _named(model, matched.tensors)
    resampled, moved = resample_positions(model, tensors, needed)
    tensors |= resampled
    headless = bool(tensors) and not any(name in tensors for name in head)
    if headless and section.labels is not None:
        raise SourceError(
            f"source.labels must name the outputs of {weights}, which has no head ({head[0]!r}), and so no outputs. "
            "Leave source.labels out, or give weights with a head."
        )
    _check_tensors(setting, matched, tensors, needed, head if headless else ())
    with torch.no_grad():  # no load_state_dict: the model's hooks have already run
        for name, tensor in needed.items():
            if name in tensors:
                tensor.copy_(tensors[name])
    unused = unused_note([name for name in matched.tensors if name not in needed], matched.tensors, section.shown)
    notes = (*matched.notes, *moved, *unused)
    if not headless:
        return SourceModel(model.eval(), "given", notes, matched.run)
    notes = (*notes, "it has no head, so no labels of its own: its outputs are neither scored nor compared with")
    read = replace(read_source(model), tensors=tensors, module=None, notes=notes, run=matched.run)
    return SourceModel(model.eval(), "given", notes, matched.run, read, headless=True)


def _check_tensors(
    setting: Setting,
    matched: Source,
    tensors: Mapping[str, Tensor],
    needed: Mapping[str, Tensor],
    lacking: Sequence[str],
) -> None:
    """Raise unless the weights fill the network, but for the parameters of a head that they may lack."""
    weights = f"source.weights {setting.spec.source.shown!r}"
    network = f"model {setting.spec.model.model_dump(mode='json')}"
    for name, tensor in needed.items():
        if name not in tensors and not name.endswith("num_batches_tracked") and name not in lacking:
            head = (
                f" If it is part of the head, name the whole head in model.head, with {lacking[0]!r}."
                if lacking
                else ""
            )
            raise SourceError(
                f"{weights} has no tensor {name!r}, which {network} needs."
                f"{_fitting(matched, needed)} Choose the model that the weights were trained with.{head}"
            )
        if name in tensors and tensors[name].shape != tensor.shape:
            raise SourceError(
                f"{weights}: {name!r} has shape {tuple(tensors[name].shape)}, but {network} "
                f"needs {tuple(tensor.shape)}. Choose the model that the weights were trained with."
            )


def _named(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors among those given, under all its names: a file has a tied one under one of them."""
    numbers = tensor_numbers(model)
    held = {number: given[name] for name, number in numbers.items() if name in given}
    return {name: given.get(name, held[number]) for name, number in numbers.items() if number in held}


def _fitting(matched: Source, needed: Mapping[str, Tensor]) -> str:
    """Return a sentence with the prefix or renaming under which more of the model is found; empty if none helps."""
    fit = best_fit(matched.tensors, needed)
    return "" if fit is None else f" With {fit} in the section source, {len(fit.names)} of its {len(needed)} are."


def _key(setting: Setting, data: Data) -> str:
    """Return a name for everything that the trained source model depends on; reads no example."""
    from conservtl import __version__

    spec, domains = setting.spec, setting.domains
    augmentation = domains.source_augmentation
    parts = {
        "format": _FORMAT,
        "conservtl": __version__,
        "torch": torch.__version__,
        "task": spec.task,
        "model": spec.model.model_dump(mode="json", exclude={"head"}),  # does not change the training
        "training": spec.source.training.model_dump(mode="json"),
        "augmentation": augmentation.model_dump(mode="json") if augmentation is not None else None,
        "labels": domains.source_labels,
        "seed": spec.seed,
        "data": setting.task.fingerprint(spec.data, data, domains.preprocessing),
    }
    if (world := current().world) > 1:  # the batch of all processes together is so many times larger
        parts["processes"] = world
    if isinstance(spec.model, NetworkSection) and spec.model.own is not None:
        parts["code"] = spec.model.digest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
