"""One run: from a spec to an adapted model and a report of what was gained and what was lost."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conservtl.adapt import Adaptation
from conservtl.engine import Holdout, fit
from conservtl.errors import MissingExtraError, SpecError
from conservtl.experiments.bundle import save_bundle
from conservtl.experiments.measure import SourceView, agreement, outputs_of, per_class, scores
from conservtl.experiments.setting import Setting, augmentation, prepare
from conservtl.experiments.source_model import SourceModel, obtain_source
from conservtl.experiments.spec import SpeechSpec, VisionSpec, dump_spec
from conservtl.plan import Plan
from conservtl.report import sentence, write_html, write_json
from conservtl.tasks.base import Data

__all__ = ["plan_of", "run"]

_RESULTS = ("report.json", "report.html", "model.safetensors")


def plan_of(spec: SpeechSpec | VisionSpec) -> Plan:
    """The plan of a spec; reads the data and the shapes of the source, trains nothing."""
    setting = prepare(spec)
    if spec.source.weights is not None:
        return setting.adaptation(obtain_source(setting).model).plan
    return setting.adaptation(setting.model(len(setting.domains.source_labels))).plan


def run(
    spec: SpeechSpec | VisionSpec, out: str | Path, *, resume: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Adapt, measure, and write a folder with everything that came of it.

    Args:
        spec: what to do.
        out: folder for ``report.json``, ``report.html``, ``model.safetensors``, ``spec.yaml`` and
            ``history.jsonl``; a checkpoint while it runs. An earlier run's files in it give way.
        resume: go on from the checkpoint in ``out``.
        progress: show bars.

    Returns:
        The content of ``report.json``.
    """
    begun = time.perf_counter()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out: {str(folder)!r} is a file. Give a folder.")
    setting = prepare(spec)
    source = obtain_source(setting, progress=progress)
    source.model.to(_device(spec))
    ready = time.perf_counter()
    adaptation = setting.adaptation(source.model)
    _begin(folder, resume=resume)
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    before = _measure(setting, source, adaptation.model if not setting.shared else source.model)
    result = fit(
        adaptation,
        setting.domains.shots,
        _valid(setting, source),
        spec.training,
        watch=_watch(setting, source),
        augment=augmentation(setting.domains.augmentation),
        out=folder,
        resume=resume,
        seed=spec.seed,
        progress=progress,
    )
    after = _measure(setting, source, adaptation.model)
    report = _report(setting, source, adaptation, before, after) | {
        "seconds": {"source": ready - begun, "adapt": result.seconds, "total": time.perf_counter() - begun},
        "environment": _environment(result.device, result.precision),
    }
    report["kept_outputs"] = result.kept_outputs
    report["sentence"] = sentence(report)
    save_bundle(folder, adaptation.model, spec, setting.domains)
    write_json(report, folder / "report.json")
    try:
        write_html(report, result.history, folder / "report.html")
    except MissingExtraError as error:
        report["note"] = str(error)
    return report


def _begin(folder: Path, *, resume: bool) -> None:
    """Make the folder, and take an earlier run's results out of it: an interrupted run must not look finished."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _RESULTS if resume else (*_RESULTS, "checkpoint.pt", "history.jsonl"):
        (folder / name).unlink(missing_ok=True)


def _device(spec: SpeechSpec | VisionSpec) -> str:
    """Where ``fit`` will train, so that measuring before and after happens there too."""
    return "cuda" if spec.training.device != "cpu" and torch.cuda.is_available() else "cpu"


def _watch(setting: Setting, source: SourceModel) -> dict[str, Any]:
    """The test parts: shown along the way, never selected on."""
    domains = setting.domains
    sets: dict[str, Any] = {"target": domains.target_test}
    if domains.source_test is not None:
        sets["source"] = _on_source(setting, source, domains.source_test)
    return sets


def _valid(setting: Setting, source: SourceModel) -> dict[str, Any] | None:
    """What may be selected on: carved from the shots, and the data that the source model was trained on."""
    domains = setting.domains
    if domains.validation is None:
        return None
    sets: dict[str, Any] = {"target": domains.validation}
    if setting.spec.training.keep == "harmonic" and domains.source_train is not None:
        sets["source"] = _on_source(setting, source, domains.source_train)
    return sets


def _on_source(setting: Setting, source: SourceModel, data: Data) -> Any:
    if setting.shared:
        return data
    view = SourceView(source.model, setting.head(source.model))
    return Holdout(data, forward=lambda model, batch: view(model, batch[0]))


def _measure(setting: Setting, source: SourceModel, model: nn.Module) -> dict[str, Any]:
    """Logits and labels on both test parts."""
    domains = setting.domains
    device = next(model.parameters()).device
    model.eval()
    found: dict[str, Any] = {"target": outputs_of(model, domains.target_test, device)}
    if domains.source_test is not None:
        if setting.shared:
            found["source"] = outputs_of(model, domains.source_test, device)
        else:
            view = SourceView(source.model, setting.head(source.model))
            found["source"] = outputs_of(lambda inputs: view(model, inputs), domains.source_test, device)
    return found


def _report(
    setting: Setting, source: SourceModel, adaptation: Adaptation, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    domains, spec = setting.domains, setting.spec
    names = {"target": domains.labels, "source": domains.source_labels}
    agreed = None
    if setting.shared:
        theirs = before["target"][0]
        agreed = {when: agreement(found["target"][0], theirs) for when, found in (("before", before), ("after", after))}
    return {
        "target": setting.target,
        "shots": spec.data.shots,
        "before": {name: scores(*before[name]) if name in before else None for name in names},
        "after": {name: scores(*after[name]) if name in after else None for name in names},
        "agreement": agreed,
        "per_class": {
            name: per_class(before[name][0], after[name][0], after[name][1], names[name]) if name in after else None
            for name in names
        },
        "drift": adaptation.drift(),
        "plan": adaptation.plan.model_dump(mode="json"),
        "transfer": {
            "source": source.origin,
            "copied": len(adaptation.transfer.copied),
            "fresh": adaptation.transfer.fresh,
            "unused": list(adaptation.transfer.unused),
            "notes": list(source.notes),
        },
        "spec": spec.model_dump(mode="json"),
    }


def _environment(device: str, precision: str) -> dict[str, str]:
    from conservtl import __version__

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "conservtl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device,
        "processor": name,
        "precision": precision,
        "threads": str(torch.get_num_threads()),
    }
