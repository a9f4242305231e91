"""One run: from a spec to an adapted model and a report of gains on the target and losses on the source."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.data import length_of
from conservtl.engine import FitResult, Holdout
from conservtl.engine.checkpoint import CHECKPOINTS, Checkpoints
from conservtl.engine.processes import Processes, connected, restarted
from conservtl.errors import MissingExtraError, SpecError
from conservtl.experiments.publishing.card import CARD, check_card, run_card
from conservtl.experiments.run.bundle import save_bundle, save_measured
from conservtl.experiments.run.evaluation_sets import (
    device_of,
    score_before,
    score_on_tests,
    selects_on_source,
    sets_to_select_on,
    sets_to_watch,
)
from conservtl.experiments.run.scoring import Scores, agreement, turned
from conservtl.experiments.run.setting import Setting, prepare
from conservtl.experiments.run.setting_checks import check_labels, check_proxies
from conservtl.experiments.run.source_training import SourceModel, prepare_source, source_data
from conservtl.experiments.spec.spec import Spec, dump_spec
from conservtl.extras import require
from conservtl.plan.plan import Plan
from conservtl.plan.table import rows_by_label
from conservtl.report import NO_SOURCE_HEAD, RunReport, sentence, write_html, write_json, write_tensorboard
from conservtl.storage.files import write_text
from conservtl.storage.locks import check_folder, lock_folder
from conservtl.tasks.bad_files import skipped_report

__all__ = ["plan_of", "run"]

_RESULTS = (
    "report.json",
    "report.html",
    CARD,
    "model.safetensors",
    "measured.safetensors",
    "history.jsonl",
    *CHECKPOINTS,
)
_PATH_EXAMPLES = 2000  # test examples of a domain that are evaluated at each point of the path


def plan_of(spec: Spec) -> Plan:
    """Return the plan of a spec; reads the data and the shapes of the source, trains nothing."""
    if spec.source.weights is not None:
        setting, source = prepare_source(spec)
        plan = setting.adaptation(source.with_notes()).plan
    else:
        setting = prepare(spec)
        source_data(setting)
        plan = setting.adaptation(setting.model(len(setting.domains.source_labels))).plan
    check_proxies(setting.domains, plan)
    return plan


def run(
    spec: Spec,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    show: Callable[[Sequence[str]], None] | None = None,
) -> RunReport:
    """Adapt, measure, and write a folder with report, model and history.

    Args:
        spec: the run's spec.
        out: folder for ``report.json``, ``report.html``, ``model.safetensors``, ``README.md`` (the model's card),
            ``spec.yaml`` and ``history.jsonl``; a checkpoint while it runs. Files of an earlier run in it are replaced.
        resume: continue from the checkpoint in ``out``; from the beginning if the run stopped before the first.
            Processes that ``torchrun --max-restarts`` starts anew do so in any case.
        progress: show bars.
        tensorboard: write the history into ``tensorboard`` below the folder, too.
        show: called with the lines on the data, those of the plan, before anything is trained; again if the source
            model adds to them.

    Returns:
        The content of ``report.json``, a dictionary that a notebook shows. Of several processes, the first alone
        writes files.

    Raises:
        SpecError: another process writes to ``out``, or it holds a ``README.md`` that no run wrote.
        WriteError: the disk is full, or ``out`` cannot be written to.
    """
    with connected(device_of(spec.training.device)) as processes:
        return _run(spec, Path(out), processes, resume=resume, progress=progress, tensorboard=tensorboard, show=show)


def _run(
    spec: Spec,
    folder: Path,
    processes: Processes,
    *,
    resume: bool,
    progress: bool,
    tensorboard: bool,
    show: Callable[[Sequence[str]], None] | None,
) -> RunReport:
    begun = time.perf_counter()
    if tensorboard:
        require("torch.utils.tensorboard", "tensorboard")  # before time is spent
    check_folder(folder)
    check_card(folder)
    if resume and not folder.exists():
        raise SpecError(f"resume: there is no checkpoint, and no folder {str(folder)!r}. Run without resume to begin.")
    setting, source = prepare_source(spec, progress=progress, show=show)
    source.model.to(device_of(spec.training.device))
    ready = time.perf_counter()
    adaptation = setting.adaptation(source.with_notes())
    check_labels(setting.domains.shots, adaptation.plan, all_of_them=True)
    check_proxies(setting.domains, adaptation.plan)
    with ExitStack() as stack:
        processes.in_first(lambda: stack.enter_context(lock_folder(folder)))
        again = restarted(processes)
        resume = processes.first((resume or again) and Checkpoints(folder).exist())
        if processes.main and not resume:
            # An interrupted run must not look finished; whether it may resume, fit decides first.
            for name in _RESULTS:
                (folder / name).unlink(missing_ok=True)
            write_text(dump_spec(setting.spec), folder / "spec.yaml")
        before = score_before(setting, source, adaptation.model)
        path = sets_to_watch(setting, source, _PATH_EXAMPLES)
        result = setting.fit(
            adaptation,
            setting.domains.shots,
            sets_to_select_on(setting, source, both=selects_on_source(spec, adaptation.plan)),
            watch=sets_to_watch(setting, source),
            path=path,
            out=folder,
            resume=resume,
            progress=progress,
        )
        if processes.main and tensorboard:
            write_tensorboard(result.history, folder / "tensorboard")
        after = score_on_tests(setting, source, adaptation.model)
        if not processes.main:
            return processes.first(RunReport({}, result.history))
        report = RunReport(_report(setting, source, adaptation, before, after), result.history)
        report["seconds"] = {"source": ready - begun, "adapt": result.seconds, "total": time.perf_counter() - begun}
        report |= _of_fit(result, path)
        if speech := sum(getattr(setting.domains.target_test, "seconds", ())):
            report["real_time_factor"] = after["target"].seconds / speech
        report["sentence"] = sentence(report)
        _write(report, folder, setting, adaptation)
        return processes.first(report)


def _write(report: RunReport, folder: Path, setting: Setting, adaptation: Adaptation) -> None:
    """Write the model and all that is said of it."""
    write_text(dump_spec(setting.spec), folder / "spec.yaml")
    save_bundle(folder, adaptation, setting)
    save_measured(folder, adaptation.measured)
    write_text(run_card(setting, adaptation, report), folder / CARD)
    write_json(report, folder / "report.json")
    try:
        write_html(report, report.history, folder / "report.html")
    except MissingExtraError as error:
        report["note"] = str(error)


def _of_fit(result: FitResult, path: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "environment": _environment(result.device, result.precision) | {"execution": result.execution},
        "kept_outputs": result.kept_outputs,
        "finished": result.after,
        "path": list(result.path),
        "path_examples": {
            name: length_of(data.data if isinstance(data, Holdout) else data) for name, data in path.items()
        },
    }


def _report(
    setting: Setting,
    source: SourceModel,
    adaptation: Adaptation,
    before: Mapping[str, Scores],
    after: Mapping[str, Scores],
) -> dict[str, Any]:
    domains, spec, task = setting.domains, setting.spec, setting.task
    names = {"target": domains.labels, "source": domains.source_labels}
    rows = adaptation.plan.source_rows
    known = [place for place, row in enumerate(rows or ()) if row is not None]  # at the start as the source's outputs
    agreed = None
    if setting.shared or len(known) > 1:
        start, end = (one["target"] if setting.shared else one["target"].of(task, known) for one in (before, after))
        sides = {when: agreement(task, scores, start) for when, scores in (("before", start), ("after", end))}
        agreed = sides if all(sides.values()) else None
    return {
        "target": setting.target,
        "shots": spec.model_dump(mode="json")["data"]["shots"],
        "taken": setting.taken,
        "examples": domains.sizes,
        "skipped": skipped_report(domains.skipped),
        "metric": task.headline.as_json(),
        "example": task.example,
        "classes": task.has_classes,
        "before": {name: before[name].metrics if name in before else None for name in names},
        "after": {name: after[name].metrics if name in after else None for name in names},
        "agreement": agreed,
        "left_out": [NO_SOURCE_HEAD] if setting.headless else [],
        "rows_by_label": list(rows_by_label(adaptation.plan).values()),
        "turned": {name: turned(task, before[name], after[name]) if name in after else None for name in names},
        "per_class": {
            name: task.per_class(before[name].outputs, after[name].outputs, after[name].labels, names[name])
            if name in after
            else None
            for name in names
        },
        "details": task.details(before, after, {"target": domains.target_test, "source": domains.source_test}),
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
