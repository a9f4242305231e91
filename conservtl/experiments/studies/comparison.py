"""Compare: variants and baselines on the same splits and source models, over targets, seeds and shots."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from conservtl.errors import agreeing, counted, joined
from conservtl.experiments.spec.sections import CompareSection
from conservtl.experiments.spec.spec import Spec, with_fields
from conservtl.experiments.studies.bootstrap import bootstrap, interval
from conservtl.experiments.studies.executors.names import PROCESSES, check_executor
from conservtl.experiments.studies.judge import Judge
from conservtl.experiments.studies.result_store import ResultStore, estimate
from conservtl.experiments.studies.run_results import distinct, over_all, repeats, taken_over
from conservtl.experiments.studies.trial import Trial, on_target
from conservtl.experiments.studies.variants import Role, baseline_ids, described, left_out, variants_of
from conservtl.report.text.examples import shots_of
from conservtl.report.text.summary import NO_LABELS

__all__ = ["compare", "plan_trials", "summarise", "trained_as"]

_ENOUGH = 5  # pairs below which an interval says too little to call a winner

Runs = Sequence[Mapping[str, Any]]


def compare(
    spec: Spec,
    out: str | Path,
    *,
    processes: int = 1,
    executor: str | Executor = PROCESSES,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run every variant that has no result yet, and summarise all of them.

    Args:
        spec: the spec, with a ``compare`` section or without.
        out: folder; results are stored run by run in ``runs``, so that an interrupted comparison continues.
        processes: number of processes of this machine.
        executor: ``processes``; ``dask:ADDRESS``, ``submitit:FOLDER?partition=NAME`` or ``module:function`` of a module
            given to ``--import``; or any ``concurrent.futures`` executor. Workers need the study's file system.
        dry_run: only count the runs and estimate their time from a measured step.
        say: is called with lines of progress.

    Returns:
        The content of ``compare.json``; with ``dry_run`` the estimate.

    Raises:
        SpecError: variants that do not make a spec, or have a baseline's name.
        DataError: fewer examples than shots, an unknown target.
    """
    check_executor(executor, processes)
    trials = plan_trials(spec)
    left = [f"{name}: {why}" for name, why in left_out(spec, spec.compare or CompareSection()).items()]
    if dry_run:
        return estimate(trials, processes) | {"left_out": left}
    result = summarise(spec, ResultStore(Path(out), say).results(trials, processes, executor))
    return result | {"left_out": [*left, *result["left_out"]], "variants": trained_as(spec)}


def trained_as(spec: Spec) -> dict[str, str]:
    """Return how each variant of a comparison is trained, in words, by its label."""
    return {variant.label: described(variant, spec) for variant in variants_of(spec, spec.compare or CompareSection())}


def plan_trials(spec: Spec) -> list[Trial]:
    """Return every run, those that share data and a source model together."""
    section = spec.compare or CompareSection()
    variants = variants_of(spec, section)
    trials = []
    for target in section.targets or spec.problem.targets(spec.data):
        for seed in range(spec.seed, spec.seed + section.seeds):
            for shots in section.model_dump(mode="json")["shots"] or (spec.data.shots,):
                run = with_fields(on_target(spec, target), {"seed": seed, "data.shots": shots})
                trials += [Trial(one.label, target, one.make(run), one.how) for one in variants]
    return trials


def summarise(spec: Spec, runs: Runs) -> dict[str, Any]:
    """Summarise all runs in tables: one for each number of shots, a row for each variant, in the order they were run.

    Returns:
        ``metric``: the headline metric; ``combination``: name of the score for both domains; ``tables``: [{shots,
        taken, best_baseline, best_baseline_id, rows: [{id, variant, role, baseline, target, source, harmonic,
        constrained, seconds, difference, wins, per_target}]}] with intervals as {mean, low, high, count}, ``harmonic``
        the score for both domains, ``difference`` its gain over the best baseline, positive if better, and ``taken``
        the fewest, the most and the mean number of examples that a class had; ``runs``; ``verdict``, a sentence for
        each table; ``left_out``, what could not be measured and why; ``rows_by_label``, how many rows of a head were
        copied by label; ``skipped``, the files that some runs skipped.
    """
    judge = Judge(spec.problem.headline)
    by_shots: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_shots[json.dumps(run["shots"])][run["variant"]].append(run)
    tables = [_table(judge, json.loads(shots), variants) for shots, variants in by_shots.items()]
    tables.sort(key=lambda table: table["shots"] if table["taken"] is None else table["taken"]["mean"])
    lacking = []
    if any(run["after"]["source"] is None for run in runs):
        headless = any(run.get("headless") for run in runs)
        reason = NO_LABELS if headless else "the source has no data to measure them on"
        lacking.append(f"source kept, {judge.combination} and constrained score: {reason}")
    return {
        "kind": "compare",
        "metric": judge.headline.as_json(),
        "combination": judge.combination,
        "classes": spec.problem.has_classes,
        "tables": tables,
        "verdict": [_verdict(judge, table, classes=spec.problem.has_classes) for table in tables],
        "left_out": lacking,
        **over_all(runs),
        "spec": spec.model_dump(mode="json"),
    }


def _table(judge: Judge, shots: Any, variants: Mapping[str, Runs]) -> dict[str, Any]:
    kinds: dict[str, tuple[str, Role]] = {label: (label, "method") for label in variants}
    kinds |= {label: kind for label, kind in baseline_ids().items() if label in variants}
    scores = {label: fmean(judge.score(run["after"]) for run in distinct(runs)) for label, runs in variants.items()}
    competing = [label for label, (_, role) in kinds.items() if role in ("source", "baseline")]
    best = max(competing, key=lambda label: judge.rank(scores[label])) if competing else None
    rows = []
    for label, runs in variants.items():
        identity, role = kinds[label]
        row = {"id": identity, "variant": label, "role": role, "baseline": role != "method"}
        rows.append(row | _figures(judge, runs, variants[best] if best is not None else ()))
    best_id = kinds[best][0] if best is not None else None
    taken = taken_over(run for runs in variants.values() for run in runs)
    return {"shots": shots, "taken": taken, "best_baseline": best, "best_baseline_id": best_id, "rows": rows}


def _figures(judge: Judge, runs: Runs, best: Runs) -> dict[str, Any]:
    """Return the figures of a variant's runs, and their paired differences from those of the best baseline.

    A run that another seed repeats counts once, and so does a pair.
    """
    once = distinct(runs)
    sourced = [run for run in once if run["after"]["source"] is not None]
    quadruples = [
        (run["before"]["target"], run["after"]["target"], run["before"]["source"], run["after"]["source"])
        for run in sourced
    ]
    reference = {(run["target"], run["seed"]): run for run in best}
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for run in runs:
        other = reference.get((run["target"], run["seed"]))
        if other and not any(repeats(run, one) and repeats(other, two) for one, two in pairs):
            pairs.append((run, other))
    gains: dict[str, list[float]] = defaultdict(list)
    for run, other in pairs:
        gains[run["target"]].append(judge.gain(judge.score(run["after"]), judge.score(other["after"])))
    difference = bootstrap(list(gains.values())) if gains and runs is not best else None
    return {
        "target": interval([run["after"]["target"] for run in once]),
        "source": interval([run["after"]["source"] for run in sourced]),
        "harmonic": interval([judge.score(run["after"]) for run in sourced]),
        "constrained": judge.constrained(quadruples),
        "seconds": interval([run["seconds"] for run in runs], least=0.0),
        "difference": asdict(difference) if difference is not None else None,
        "wins": bool(difference is not None and difference.low > 0 and difference.count >= _ENOUGH),
        "per_target": {
            target: {
                when: interval([run[when]["target"] for run in once if run["target"] == target])
                for when in ("before", "after")
            }
            for target in dict.fromkeys(run["target"] for run in runs)
        },
    }


def _verdict(judge: Judge, table: Mapping[str, Any], *, classes: bool) -> str:
    """Return one sentence, plain where nothing wins."""
    where = f"At {shots_of(table, classes=classes)}"
    methods = [row for row in table["rows"] if not row["baseline"]]
    if table["best_baseline"] is None or not methods:
        return f"{where} there is nothing to compare with."
    means = [(row["harmonic"] or row["target"])["mean"] for row in methods]
    best = methods[means.index(max(means, key=judge.rank))]
    alike = [row["variant"] for row, mean in zip(methods, means, strict=True) if mean == means[methods.index(best)]]
    near = f"{joined(alike)} {agreeing(len(alike), 'is')}"
    what = f"{judge.combination} of target and source" if best["harmonic"] else f"target {judge.headline.label}"
    gap = best["difference"]
    mean, low, high = (_difference(judge, gap[key]) for key in ("mean", "low", "high"))
    ends = f" ({low} to {high})" if best["wins"] or low != high else ""
    figures = f"{mean}{' points' if judge.headline.share else ''}{ends} in the {what}"
    if best["wins"]:
        return f"{where} {best['variant']} beats the best baseline, {table['best_baseline']}: {figures}."
    if gap["count"] < _ENOUGH:
        few = f"{counted(gap['count'], 'paired run', 'is')} too few to tell"
        return f"{where} {few}: {near} nearest, {figures}."
    return (
        f"{where} nothing beats the best baseline, {table['best_baseline']}, beyond chance: the nearest "
        f"{agreeing(len(alike), 'is')} {joined(alike)}, {figures}."
    )


def _difference(judge: Judge, gain: float) -> str:
    return f"{100 * gain:+.1f}" if judge.headline.share else f"{gain:+.3g}"
