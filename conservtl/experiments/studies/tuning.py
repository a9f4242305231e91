"""Tune: a search over the fields that a spec marks with a range; any number of processes share one study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from conservtl.data import Domains
from conservtl.data.shots import may_validate
from conservtl.errors import ConservtlError, InputError, SpecError
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.search_space import SearchRange, ranges_of
from conservtl.experiments.spec.spec import dump_spec, parse_spec, with_fields
from conservtl.experiments.spec.study_sections import TuneSection
from conservtl.experiments.studies.judge import Judge
from conservtl.experiments.studies.result_store import estimate
from conservtl.experiments.studies.trial import Trial, run_trial
from conservtl.extras import require
from conservtl.storage.files import write_text

__all__ = ["tune"]

_NAME = "conservtl"


def tune(
    content: Mapping[str, Any], out: str | Path, *, dry_run: bool = False, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Search the marked fields, judged on validation parts alone.

    Several processes started by hand with the same spec and storage share one study; a killed process loses only the
    trial that it was running.

    Args:
        content: the spec as it was read, with its marks.
        out: folder for ``tune.json``, ``best.yaml`` and, by default, the storage.
        dry_run: only count the runs and estimate their time from a measured step.
        say: is called with lines of progress.

    Returns:
        The content of ``tune.json``: every trial of the study so far, and which are best.

    Raises:
        SpecError: nothing is marked, there is no validation part to judge by, or the storage holds a study of another
            spec.
        MissingExtraError: Optuna is not installed.
    """
    ranges = ranges_of(content)
    first = parse_spec(with_values(content, {name: field.first() for name, field in ranges.items()}))
    section = first.tune or TuneSection()
    if first.data.validation == 0 or not may_validate(first.data.shots):
        raise SpecError(
            f"tune: trials are judged on a part of the shots; data.validation is {first.data.validation:g} and "
            f"data.shots {first.model_dump(mode='json')['data']['shots']}. Set data.validation to 0.4, say, with at "
            "least 2 shots."
        )
    if section.objective != "target" and first.source.data is None:
        raise SpecError(f"tune.objective={section.objective} needs source data, and source.data is null. Use target.")
    _check_domains(Trial("tune", "the spec's", first).domains(), section)
    runs = section.trials * section.seeds
    if dry_run:
        return {**estimate([Trial("tune", "the spec's", first)], 1), "runs": runs}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    judge = Judge(first.problem.headline)
    study = _study(section, content, folder, judge)
    objective = _TrialObjective(content, ranges, section, judge, say or (lambda _: None))
    study.optimize(objective, n_trials=section.trials, catch=_CATCH)
    result = _result(study, ranges, section, content) | {"metric": judge.headline.as_json()}
    for number, trial in enumerate(result["best"]):
        name = "best.yaml" if len(result["best"]) == 1 else f"best-{number}.yaml"
        params = next(one["params"] for one in result["trials"] if one["number"] == trial)
        write_text(dump_spec(parse_spec(with_values(content, params))), folder / name)
    return result


def _check_domains(domains: Domains, section: TuneSection) -> None:
    """Raise unless the data has what trials are judged on.

    Raises:
        SpecError: there is no source data to train on, or no class has a second shot to validate on.
    """
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


_CATCH: tuple[type[Exception], ...] = (ConservtlError,)


class _TrialObjective:
    """The function that Optuna calls for each trial."""

    def __init__(
        self,
        content: Mapping[str, Any],
        ranges: Mapping[str, SearchRange],
        section: TuneSection,
        judge: Judge,
        say: Callable[[str], None],
    ) -> None:
        self.content, self.ranges, self.section, self.judge, self.say = content, ranges, section, judge, say

    def __call__(self, trial: Any) -> Any:
        params = {name: _suggest(trial, name, field) for name, field in self.ranges.items()}
        try:
            spec = parse_spec(with_values(self.content, params))
        except InputError as error:
            trial.set_user_attr("why", str(error))
            raise
        runs = []
        for number in range(self.section.seeds):
            tell = partial(self._prune, trial, number * spec.training.epochs)
            seeded = with_fields(spec, {"seed": spec.seed + number})
            runs.append(run_trial(Trial("tune", "the spec's", seeded), judge=True, tell=tell))
        mean = {name: sum(run["valid"][name] for run in runs) / len(runs) for name in runs[0]["valid"]}
        trial.set_user_attr("target", mean["target"])
        trial.set_user_attr("source", mean.get("source"))
        trial.set_user_attr("seconds", sum(run["seconds"] for run in runs))
        shown = ", ".join(f"{name} {self.judge.headline.show(value)}" for name, value in mean.items())
        self.say(f"trial {trial.number}: {shown}")
        return (mean["target"], mean["source"]) if self.section.objective == "both" else self._score(mean)

    def _prune(self, trial: Any, step: int, line: Mapping[str, Any]) -> None:
        """Give up a trial that has fallen behind the median."""
        if "valid" not in line or not self.section.prune or self.section.objective == "both":
            return
        values = {name: metrics[self.judge.headline.metric] for name, metrics in line["valid"].items()}
        trial.report(self._score(values), step + line["epoch"])
        if trial.should_prune():
            raise require("optuna", "experiments").TrialPruned

    def _score(self, values: Mapping[str, float]) -> float:
        if self.section.objective == "target":
            return values["target"]
        return self.judge.both(values["target"], values["source"])


def _suggest(trial: Any, name: str, field: SearchRange) -> Any:
    if field.choices is not None:
        return trial.suggest_categorical(name, list(field.choices))
    low, high = field.range or (0.0, 1.0)
    if field.whole:
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=field.log)


def _study(section: TuneSection, content: Mapping[str, Any], folder: Path, judge: Judge) -> Any:
    """The study in the storage, or a new one.

    Raises:
        SpecError: the storage holds a study of another spec.
    """
    optuna = require("optuna", "experiments")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = section.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    searched = {key: value for key, value in content.items() if key != "tune"} | {"objective": section.objective}
    digest = hashlib.sha256(json.dumps(searched, sort_keys=True, default=str).encode()).hexdigest()[:16]
    both = section.objective == "both"
    study = optuna.create_study(
        study_name=_NAME,
        storage=url,
        load_if_exists=True,
        directions=["maximize" if judge.headline.better == "higher" else "minimize"] * (2 if both else 1),
        pruner=optuna.pruners.MedianPruner() if section.prune and not both else optuna.pruners.NopPruner(),
    )
    stored = study.user_attrs.get("spec")
    if stored is not None and stored != digest:
        raise SpecError(
            f"tune.storage: the study in {url} is of another spec (another field, range or objective). Give another "
            "storage, or another --out."
        )
    study.set_user_attr("spec", digest)
    return study


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
        "spec": dict(content),
    }
