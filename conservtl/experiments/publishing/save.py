"""Saving an adapted model from Python as a run does, with a card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.bounds import as_path
from conservtl.errors import SpecError, agreeing, counted
from conservtl.experiments.publishing.card import CARD, Card, card_text
from conservtl.experiments.publishing.licence import base_model as base_of
from conservtl.experiments.publishing.licence import licence_of
from conservtl.experiments.run.bundle import save_measured
from conservtl.experiments.run.bundle_header import merged_model
from conservtl.layers import named_parameters
from conservtl.report.text.report_json import write_json
from conservtl.source.run_header import OWN, WEIGHTS
from conservtl.storage.files import write_text
from conservtl.storage.folders import atomic_folder, check_replaceable
from conservtl.storage.tensor_files import save_tensors
from conservtl.storage.tensor_writer import CODES

__all__ = ["save"]

_FILES = (WEIGHTS, "measured.safetensors", "plan.json", "report.json", "config.json", CARD)


def save(
    adaptation: Adaptation,
    folder: str | Path,
    labels: Sequence[str] = (),
    *,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Save an adapted model in a folder: weights, plan, card, and metrics if they are given.

    ``model.safetensors`` holds the weights of the model with additions of strategies merged in where that is exact, and
    an adapter of PEFT merged and unloaded. Additions that cannot be merged are named in its header, and put into the
    model again by ``load_adapted(folder, model)`` and by ``adapt(model, folder)``. A model of Hugging Face's library
    gets its ``config.json``. ``README.md`` is a card for the Hugging Face Hub.

    Args:
        adaptation: trained.
        folder: new or empty.
        labels: names of the model's outputs in their order.
        preprocessing: how inputs are made, as JSON; a declaration for those who load the model.
        metrics: as in a run's ``report.json``: ``{"before": {"target": {"accuracy": 0.7}, "source": {...}},
            "after": {...}}``, or the result of ``ctl.evaluate``; the source's are those that the model retains.
            ``"target"`` may name the target.
        metadata: further content of the header, as JSON.
        licence: of the source. None: as the source's card, timm or torchvision states it.
        base_model: the source's repository on the Hub, ``ORG/NAME``. None: that of the source's name, if it has one.
        overwrite: whether an earlier result in the folder is replaced.

    Returns:
        The folder.

    Raises:
        SpecError: an argument is wrong, the folder holds files, or a part of the model's state cannot be saved; the
            message names it.
        WriteError: the disk is full, or the folder cannot be written to; nothing has changed then.

    Example:
        >>> import tempfile, torch, conservtl as ctl
        >>> adaptation = ctl.adapt(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), [ctl.L2SP()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = ctl.save(adaptation, f"{folder}/out", ["no", "yes"], metrics={"after": {"target": {"f1": 0.9}}})
        ...     ctl.load_adapted(saved, torch.nn.Linear(2, 2)).labels
        ('no', 'yes')
    """
    if not isinstance(adaptation, Adaptation):
        raise SpecError(f"save needs an adaptation, as adapt returns it; received {type(adaptation).__name__}.")
    target = as_path(folder, "folder")
    check_replaceable(target, _FILES, overwrite=overwrite)
    _check_base(base_model)
    report = _report(metrics)
    names = _labels(labels, adaptation)
    model, extended = _merged(adaptation)
    kind = type(model)
    header = {
        "task": OWN,
        "labels": list(names),
        "model": {"class": f"{kind.__module__}.{kind.__qualname__}"},
        "preprocessing": _json(preprocessing or {}, "preprocessing"),
        "metadata": _json(metadata or {}, "metadata"),
    } | extended
    state = model.state_dict()
    _check_state(state)
    source = adaptation.origin.source
    config = getattr(getattr(model, "config", None), "to_json_string", None)
    card = Card(
        title=f"{kind.__name__} adapted to {report['target']}" if report.get("target") else f"{kind.__name__}, adapted",
        plan=adaptation.plan,
        strategies=[strategy.label for strategy in adaptation.origin.strategies],
        drift=adaptation.drift(),
        labels=names,
        source=Path(source).name if Path(source).is_absolute() else source,
        base=base_model or base_of(source),
        licence=licence or licence_of(source),
        pipeline=None,
        library="transformers" if callable(config) else "conservtl",
        loading=_loading(kind, transformers=callable(config), extended=bool(extended)),
        report=report,
    )
    text = card_text(card)
    with atomic_folder(target) as place:
        save_tensors(state, place / WEIGHTS, header)
        save_measured(place, adaptation.measured)
        write_text(adaptation.plan.model_dump_json(indent=2) + "\n", place / "plan.json")
        if report:
            write_json(report, place / "report.json")
        if callable(config):
            write_text(_with_labels(config(), names, model), place / "config.json")
        write_text(text, place / CARD)
    return target


def _with_labels(config: str, labels: tuple[str, ...], model: nn.Module) -> str:
    """Return a configuration of transformers, JSON, with the labels where it counts as many."""
    if not labels or getattr(model.config, "num_labels", None) != len(labels):
        return config
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}
    return json.dumps(json.loads(config) | named, indent=2) + "\n"


def _check_base(base: str | None) -> None:
    """Raise unless the base model has a name that the Hub's metadata can hold."""
    if base is not None and (not isinstance(base, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
        raise SpecError(
            f"base_model must be a repository on the Hub, ORG/NAME; received {base!r:.60}. Leave it out if there is "
            "none."
        )


def _merged(adaptation: Adaptation) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model, extended = merged_model(adaptation, adaptation.origin.structure)
        json.dumps(extended)
    except (TypeError, AttributeError) as error:
        raise SpecError(
            "save: the model has additions that cannot be merged, which are found again by the example given to adapt; "
            f"it must be a tensor or a dictionary of tensors ({error}). Adapt with such an example."
        ) from error
    return model, extended


def _labels(labels: Sequence[str], adaptation: Adaptation) -> tuple[str, ...]:
    if isinstance(labels, str) or not isinstance(labels, Iterable) or any(not isinstance(one, str) for one in labels):
        raise SpecError(f"labels must be a list of texts, one for each output; received {labels!r:.80}.")
    if twice := [label for label in labels if list(labels).count(label) > 1]:
        raise SpecError(f"labels must differ from each other; received {twice[0]!r} twice. Name each output once.")
    parameters = named_parameters(adaptation.model)
    for name in adaptation.plan.head if labels else ():
        weight = parameters.get(name)
        if weight is not None and weight.ndim > 1 and len(weight) != len(labels):
            raise SpecError(
                f"labels must name each output; the head {name!r} has {len(weight)}, and there "
                f"{agreeing(len(labels), 'is')} {counted(len(labels), 'label')}. Give one for each, in their order."
            )
    return tuple(labels)


def _report(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the parts of a report that a card shows; values are finite numbers."""
    if metrics is None:
        return {}
    form = 'metrics must have the form {"before": {"target": {"accuracy": 0.7}, "source": {...}}, "after": {...}}'
    if not isinstance(metrics, Mapping) or not isinstance(metrics.get("after"), Mapping):
        raise SpecError(f"{form}, before left out if it is unknown; received {metrics!r:.120}.")
    found: dict[str, Any] = {}
    for side in ("before", "after"):
        given = metrics.get(side) or {}
        for domain, values in given.items():
            if values is None:
                continue
            if not {"target", "source"} & {domain, *given} or not isinstance(values, Mapping):
                raise SpecError(f"{form}; received {domain!r}: {values!r:.60} in {side!r}.")
            read = {str(name): _number(value, f"{side}.{domain}.{name}") for name, value in values.items()}
            found.setdefault(side, {})[domain] = read
    kept = {key: metrics[key] for key in ("target", "metric", "agreement") if metrics.get(key) is not None}
    return found | _json(kept, "metrics")


def _number(value: Any, name: str) -> float:
    if getattr(value, "shape", None) == ():  # a scalar of PyTorch or NumPy
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"metrics: {name} must be a finite number; received {value!r:.60}. Leave it out if unknown.")
    return value


def _json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        read = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name} must be a mapping that JSON can hold; {error}. Convert it before.") from error
    return dict(read)


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise unless each part of a model's state is an ordinary tensor."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            what = f"a {type(value).__name__}"
        elif type(value).__name__ == "DTensor":
            what = "a tensor sharded over processes"
        elif value.is_meta:
            what = "a tensor without values"
        elif value.layout != torch.strided or value.is_quantized or value.dtype not in CODES:
            what = f"a tensor of {value.dtype}, {value.layout}"
        else:
            continue
        raise SpecError(
            f"save holds ordinary tensors alone; {name!r} of the model's state is {what}. Replace it, or save the "
            "model by your own means."
        )


def _loading(kind: type, *, transformers: bool, extended: bool) -> str:
    if extended:
        return (
            "import conservtl as ctl  # strategies changed the computation of some modules\n\n"
            f'adapted = ctl.load_adapted(".", model)  # model: a {kind.__name__} as it was before adapt'
        )
    if transformers:
        return f'from transformers import {kind.__name__}\n\nmodel = {kind.__name__}.from_pretrained(".")'
    return (
        "from safetensors.torch import load_file\n\n"
        f"model = ...  # a {kind.__module__}.{kind.__qualname__} of the same structure\n"
        'model.load_state_dict(load_file("model.safetensors"))'
    )
