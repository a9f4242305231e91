"""A search as any process takes it up: the study in its storage, and what one trial does."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from conservtl.errors import ConservtlError, SpecError
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.search_space import SearchRange, ranges_of
from conservtl.experiments.spec.sections import TuneSection
from conservtl.experiments.spec.spec import Spec, parse_spec, with_fields
from conservtl.experiments.studies.judge import Judge
from conservtl.experiments.studies.study_storage import opened_storage, shown_url
from conservtl.experiments.studies.trial import Trial, run_trial
from conservtl.experiments.studies.trial_claims import claims
from conservtl.extras import require
from conservtl.plugins import import_modules
from conservtl.storage.locks import wait_for_lock

__all__ = ["OneTrial", "Search"]

_NAME = "conservtl"


@dataclass(frozen=True)
class Search:
    """A search as any process can take it up.

    Args:
        content: the spec as it was read.
        folder: the study's folder.
        imports: modules that the spec needs.
    """

    content: Mapping[str, Any]
    folder: Path
    imports: tuple[str, ...]

    @cached_property
    def ranges(self) -> dict[str, SearchRange]:
        """The marked fields."""
        return ranges_of(self.content)

    @cached_property
    def first(self) -> Spec:
        """The spec with the first value of each range."""
        return parse_spec(with_values(self.content, {name: field.first() for name, field in self.ranges.items()}))

    @property
    def section(self) -> TuneSection:
        """The settings of the search."""
        return self.first.tune or TuneSection()

    @property
    def judge(self) -> Judge:
        """The judge of trials."""
        return Judge(self.first.problem.headline)

    @contextmanager
    def study(self) -> Iterator[tuple[Any, Any]]:
        """Yield the study and its storage; one process of the folder at a time creates them.

        Raises:
            SpecError: the storage holds a study of another spec, or cannot be opened.
            MissingExtraError: Optuna, or the driver of the storage's database, is not installed.
        """
        url = self.section.storage or f"sqlite:///{(self.folder / 'study.db').resolve()}"
        with ExitStack() as stack:
            with wait_for_lock(self.folder / ".trials.lock"):
                storage = stack.enter_context(opened_storage(url))
                study = _study(storage, shown_url(url), self.section, self.content, self.judge)
            yield study, storage

    def run(self, study: Any, storage: Any, most: int, say: Callable[[str], None]) -> None:
        """Run trials until the folder has all of its own, or this process so many."""
        pruned = require("optuna", "experiments").TrialPruned
        states = require("optuna", "experiments").trial.TrialState
        with claims(study, storage, self.folder, self.section.trials, say) as left:
            for _ in range(most):
                if (trial := left.next()) is None:
                    return
                try:
                    values = self._try(trial, say)
                except pruned:
                    study.tell(trial, state=states.PRUNED)
                except ConservtlError as error:
                    trial.set_user_attr("why", str(error))
                    study.tell(trial, state=states.FAIL)
                else:
                    study.tell(trial, values)

    def _try(self, trial: Any, say: Callable[[str], None]) -> Any:
        """Train with a trial's values, and return what Optuna judges it by."""
        params = {name: _suggest(trial, name, field) for name, field in self.ranges.items()}
        spec = parse_spec(with_values(self.content, params))
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
        say(f"trial {trial.number}: {shown}")
        return (mean["target"], mean["source"]) if self.section.objective == "both" else self._score(mean)

    def _prune(self, trial: Any, step: int, line: Mapping[str, Any]) -> None:
        """Give up a trial that has fallen behind the median."""
        if "valid" not in line or not self.section.prune or self.section.objective == "both":
            return
        values = {name: metrics[self.judge.headline.metric] for name, metrics in line["valid"].items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The reported value is ignored")  # of a repeated trial: the same value
            trial.report(self._score(values), step + line["epoch"])
        if trial.should_prune():
            raise require("optuna", "experiments").TrialPruned

    def _score(self, values: Mapping[str, float]) -> float:
        if self.section.objective == "target":
            return values["target"]
        return self.judge.both(values["target"], values["source"])


@dataclass(frozen=True)
class OneTrial:
    """A trial for a worker: the next that is left."""

    search: Search
    number: int

    @property
    def name(self) -> str:
        """A name for messages: it is not known yet which trial it will be."""
        return f"worker {self.number} of the search"

    def run(self) -> None:
        """Run the next trial; none if none is left."""
        import_modules(self.search.imports)
        with self.search.study() as (study, storage):
            # To the worker's log.
            self.search.run(study, storage, 1, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201

    def rest(self) -> list[OneTrial]:
        """Return this: the trial of a lost worker is one that is left."""
        return [self]

    def __len__(self) -> int:
        return 1


def _suggest(trial: Any, name: str, field: SearchRange) -> Any:
    if field.choices is not None:
        return trial.suggest_categorical(name, list(field.choices))
    low, high = field.range or (0.0, 1.0)
    if field.whole:
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=field.log)


def _study(storage: Any, shown: str, section: TuneSection, content: Mapping[str, Any], judge: Judge) -> Any:
    """Return the study in the storage, which must be of this spec, or a new one."""
    optuna = require("optuna", "experiments")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = {key: value for key, value in content.items() if key != "tune"} | {"objective": section.objective}
    digest = hashlib.sha256(json.dumps(searched, sort_keys=True, default=str).encode()).hexdigest()[:16]
    both = section.objective == "both"
    study = optuna.create_study(
        study_name=_NAME,
        storage=storage,
        load_if_exists=True,
        directions=["maximize" if judge.headline.better == "higher" else "minimize"] * (2 if both else 1),
        pruner=optuna.pruners.MedianPruner() if section.prune and not both else optuna.pruners.NopPruner(),
    )
    stored = study.user_attrs.get("spec")
    if stored is not None and stored != digest:
        raise SpecError(
            f"tune.storage: the study in {shown} is of another spec (another field, range or objective). "
            "Give another storage, or another --out."
        )
    study.set_user_attr("spec", digest)
    return study
