"""One run: from a spec to an adapted model and a report of what was gained and what was lost."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine import Holdout, fit
from conservtl.errors import MissingExtraError, SpecError
from conservtl.experiments.run.bundle import save_bundle, save_measured
from conservtl.experiments.run.evaluation_sets import device_of, outputs_on, valid_sets, wants_source, watch_sets
from conservtl.experiments.run.scoring import agreement, per_class, scores
from conservtl.experiments.run.setting import Setting, augmentation, prepare
from conservtl.experiments.run.source_training import SourceModel, obtain_source
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec, dump_spec
from conservtl.extras import require
from conservtl.plan.plan import Plan
from conservtl.report import sentence, write_html, write_json, write_tensorboard

__all__ = ["plan_of", "run"]

_RESULTS = ("report.json", "report.html", "model.safetensors", "measured.safetensors")
_PATH = 2000  # test examples of a domain that are looked at on each point of the path


def plan_of(spec: SpeechSpec | VisionSpec) -> Plan:
    """The plan of a spec; reads the data and the shapes of the source, trains nothing."""
    setting = prepare(spec)
    if spec.source.weights is not None:
        return setting.adaptation(obtain_source(setting).model).plan
    return setting.adaptation(setting.model(len(setting.domains.source_labels))).plan


def run(
    spec: SpeechSpec | VisionSpec,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Adapt, measure, and write a folder with everything that came of it.

    Args:
        spec: what to do.
        out: folder for ``report.json``, ``report.html``, ``model.safetensors``, ``spec.yaml`` and
            ``history.jsonl``; a checkpoint while it runs. An earlier run's files in it give way.
        resume: go on from the checkpoint in ``out``.
        progress: show bars.
        tensorboard: write the history into ``tensorboard`` below the folder, too.

    Returns:
        The content of ``report.json``.
    """
    begun = time.perf_counter()
    if tensorboard:
        require("torch.utils.tensorboard", "tensorboard")  # before time is spent
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out: {str(folder)!r} is a file. Give a folder.")
    setting = prepare(spec)
    source = obtain_source(setting, progress=progress)
    source.model.to(device_of(spec.training.device))
    ready = time.perf_counter()
    adaptation = setting.adaptation(source.model)
    _begin(folder, resume=resume)
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    before = outputs_on(setting, source, adaptation.model if not setting.shared else source.model)
    path = watch_sets(setting, source, _PATH)
    result = fit(
        adaptation,
        setting.domains.shots,
        valid_sets(setting, source, both=wants_source(spec, adaptation.plan)),
        spec.training,
        watch=watch_sets(setting, source),
        path=path,
        source=setting.domains.source_train,
        augment=augmentation(setting.domains.augmentation),
        out=folder,
        resume=resume,
        seed=spec.seed,
        progress=progress,
    )
    if tensorboard:
        write_tensorboard(result.history, folder / "tensorboard")
    after = outputs_on(setting, source, adaptation.model)
    report = _report(setting, source, adaptation, before, after) | {
        "seconds": {"source": ready - begun, "adapt": result.seconds, "total": time.perf_counter() - begun},
        "environment": _environment(result.device, result.precision),
    }
    report["kept_outputs"] = result.kept_outputs
    report["finished"] = result.after
    report["path"] = list(result.path)
    report["path_examples"] = {name: len(one.data if isinstance(one, Holdout) else one) for name, one in path.items()}
    report["sentence"] = sentence(report)
    save_bundle(folder, adaptation, setting)
    save_measured(folder, adaptation.measured)
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
