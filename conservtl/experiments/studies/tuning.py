"""Tune: a search over the fields that a spec marks with a range; any number of processes share one study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from conservtl.data import Domains, length_of
from conservtl.data.shots import may_validate
from conservtl.errors import SpecError
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.search_space import SearchRange
from conservtl.experiments.spec.sections import TuneSection
from conservtl.experiments.spec.spec import dump_spec, parse_spec
from conservtl.experiments.studies.executors.dispatch import finish
from conservtl.experiments.studies.executors.names import PROCESSES, check_executor, is_local, workers_of
from conservtl.experiments.studies.result_store import estimate
from conservtl.experiments.studies.search import OneTrial, Search
from conservtl.experiments.studies.study_storage import shown_url
from conservtl.experiments.studies.trial import Trial
from conservtl.plugins import imported_modules
from conservtl.storage.files import write_text
from conservtl.storage.locks import check_folder
from conservtl.tasks.bad_files import skipped_report

__all__ = ["best_files", "tune"]


def tune(
    content: Mapping[str, Any],
    out: str | Path,
    *,
    processes: int = 1,
    executor: str | Executor = PROCESSES,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Search the marked fields, judged on validation parts alone.

    Processes that work in the same folder, started here or by hand, share its trials; folders with the same storage
    share a study, and their trials add up. The trial of a process that is killed is repeated with the same parameters,
    by another process or a repeated call, so that their number stays as asked for. ``content`` is the spec as it was
    read, with its marks; other arguments are as for ``comparison.compare``.

    Returns:
        The content of ``tune.json``: every trial of the study so far, which are best, and the number of the target's
        validation examples over all seeds of a trial.

    Raises:
        SpecError: nothing is marked, there is no validation part to judge by, or the storage holds a study of another
            spec, does not answer, or cannot be shared by many machines.
        MissingExtraError: Optuna is not installed, or the driver of the storage's database.
        LostWorkerError: a worker was lost again and again.
    """
    check_executor(executor, processes)
    search = Search(content, Path(out), imported_modules())
    section, trial = search.section, _judged(search, executor)
    domains = trial.domains()
    validation: Any = domains.validation  # checked by _judged
    runs = section.trials * section.seeds
    if dry_run:
        return {**estimate([trial], 1), "runs": runs}
    say = say or (lambda _: None)
    check_folder(search.folder)
    search.folder.mkdir(parents=True, exist_ok=True)
    with search.study() as (study, storage):
        if processes > 1 or not is_local(executor):
            works = [OneTrial(search, number) for number in range(section.trials)]
            list(finish(works, workers_of(executor, processes), say))
        else:
            search.run(study, storage, section.trials, say)
        result: dict[str, Any] = _result(study, search.ranges, section, content) | {
            "metric": search.judge.headline.as_json(),
            "skipped": skipped_report(domains.skipped),
            "validation": section.seeds * length_of(validation),
        }
    for name, number in best_files(result).items():
        params = next(one["params"] for one in result["trials"] if one["number"] == number)
        write_text(dump_spec(parse_spec(with_values(result["spec"], params))), search.folder / name)
    return result


def best_files(result: Mapping[str, Any]) -> dict[str, int]:
    """Return the files that hold the best specs, each with the number of its trial."""
    best = result["best"]
    return {"best.yaml" if len(best) == 1 else f"best-{place}.yaml": number for place, number in enumerate(best)}


def _judged(search: Search, executor: str | Executor) -> Trial:
    """Return a trial of the spec as it stands; raise unless trials can be judged as the section says."""
    first, section = search.first, search.section
    if first.data.validation == 0 or not may_validate(first.data.shots):
        raise SpecError(
            f"tune: trials are judged on a part of the shots; data.validation is {first.data.validation:g} and "
            f"data.shots {first.model_dump(mode='json')['data']['shots']}. Set data.validation to 0.4, say, with at "
            "least 2 shots."
        )
    if section.objective != "target" and first.source.data is None:
        raise SpecError(f"tune.objective={section.objective} needs source data, and source.data is null. Use target.")
    if section.storage is None and not is_local(executor):
        raise SpecError(
            "tune.storage: workers of an executor need a storage that all machines reach; it is null, a SQLite file in "
            "the folder. Give journal:FILE on the shared file system, or the URL of a database."
        )
    trial = Trial("tune", "the spec's", first)
    if section.objective != "target" and trial.headless():
        raise SpecError(
            f"tune.objective={section.objective} needs the source's score, and source.weights have no head, so the "
            "source has no labels of its own. Set tune.objective to target."
        )
    _check_domains(trial.domains(), section)
    return trial


def _check_domains(domains: Domains, section: TuneSection) -> None:
    """Raise unless the data has what trials are judged on."""
    if section.objective != "target" and domains.source_train is None:
        raise SpecError(
            f"tune.objective={section.objective} needs source data, and the section data names none. Give it, such as "
            "data.source_root, or set tune.objective to target."
        )
    if domains.validation is None:
        raise SpecError(
            "tune: trials are judged on a part of the shots, and no class has a second example. Give more examples, or "
            "raise data.shots."
        )


def _result(
    study: Any, ranges: Mapping[str, SearchRange], section: TuneSection, content: Mapping[str, Any]
) -> dict[str, Any]:
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower().replace("fail", "failed"),
            "values": list(trial.values or ()),
            "params": dict(trial.params),
            "target": trial.user_attrs.get("target"),
            "source": trial.user_attrs.get("source"),
            "seconds": trial.user_attrs.get("seconds"),
            "why": trial.user_attrs.get("why"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    fields = {
        name: {"choices": list(field.choices)}
        if field.choices is not None
        else {"low": (field.range or (0, 0))[0], "high": (field.range or (0, 0))[1], "log": field.log}
        for name, field in ranges.items()
    }
    done = any(trial["state"] == "complete" for trial in trials)
    best = (study.best_trials if section.objective == "both" else [study.best_trial]) if done else []
    return {
        "kind": "tune",
        "objective": section.objective,
        "fields": fields,
        "trials": trials,
        "best": [trial.number for trial in best],
        "spec": _without_password(content),
    }


def _without_password(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec without the password that a storage's URL may have."""
    section = content.get("tune")
    if not isinstance(section, Mapping) or not isinstance(section.get("storage"), str):
        return dict(content)
    return {**content, "tune": {**section, "storage": shown_url(section["storage"])}}
