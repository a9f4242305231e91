"""Compare: variants and baselines on the same splits and source models, over targets, seeds and shots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conservtl.engine import harmonic_mean
from conservtl.errors import SpecError
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec
from conservtl.experiments.spec.study_sections import BASELINES, CompareSection
from conservtl.experiments.studies.bootstrap import bootstrap, constrained, interval, mean_interval
from conservtl.experiments.studies.result_store import Many, estimate, with_fields
from conservtl.experiments.studies.targets import on_target, targets_of
from conservtl.experiments.studies.trial import How, Trial

__all__ = ["compare", "plan_trials", "summarise"]

_ENOUGH = 5  # pairs below which an interval says too little to call a winner
_EARLY = {"keep": "target", "patience": 5}


def compare(
    spec: SpeechSpec | VisionSpec,
    out: str | Path,
    *,
    processes: int = 1,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run everything that is not there yet, and sum it up.

    Args:
        spec: the spec, with a ``compare`` section or without.
        out: folder; results are kept run by run in ``runs``, so that an interrupted comparison goes on.
        processes: runs done at the same time.
        dry_run: only count the runs and estimate their time from a measured step.
        say: told of progress.

    Returns:
        The content of ``compare.json``; with ``dry_run`` the estimate.

    Raises:
        SpecError: variants that do not make a spec, or have a baseline's name.
        DataError: fewer recordings than shots, an unknown target.
    """
    trials = plan_trials(spec)
    if dry_run:
        return estimate(trials, processes)
    runs = Many(Path(out), say).results(trials, processes)
    return summarise(spec, runs)


def plan_trials(spec: SpeechSpec | VisionSpec) -> list[Trial]:
    """Every run, those that share data and a source model together."""
    section = spec.compare or CompareSection()
    variants = _variants(spec, section)
    trials = []
    for target in section.targets or targets_of(spec):
        for seed in range(spec.seed, spec.seed + section.seeds):
            for shots in section.shots or (spec.data.shots,):
                here = with_fields(on_target(spec, target), {"seed": seed, "data.shots": shots})
                trials += [Trial(name, target, make(here), how) for name, (make, how) in variants.items()]
    return trials


Make = Callable[[Any], Any]


def _variants(spec: SpeechSpec | VisionSpec, section: CompareSection) -> dict[str, tuple[Make, How]]:
    """Name -> how its spec is made from a run's, and how it is trained."""
    own: dict[str, Mapping[str, Any]] = dict(section.variants) or {_name(spec): {}}
    if clash := set(own) & set(BASELINES):
        raise SpecError(f"compare.variants: {sorted(clash)} are names of baselines. Give them names of their own.")
    found: dict[str, tuple[Make, How]] = {}
    for name in map(str, section.baselines):
        if name == "joint training" and not _same_labels(spec):
            continue
        found[name] = _baseline(name, section)
    for name, fields in own.items():
        found[name] = (_maker(fields), "adapt")
    return found


def _maker(fields: Mapping[str, Any]) -> Make:
    return lambda spec: with_fields(spec, fields)


def _baseline(name: str, section: CompareSection) -> tuple[Make, How]:
    plain: dict[str, Any] = {"strategies": []}
    rates = dict(zip(("low", "middle", "high"), section.rates, strict=True))
    if name == "source as it is":
        return _maker(plain), "source"
    if name == "from scratch":
        return _maker({**plain, "training.lr": section.scratch_rate, "training.batch_norm": "train"}), "scratch"
    if name == "linear probe":
        probe = {"strategies": [{"kind": "feature_extraction"}], "training.lr": section.probe_rate}
        return _maker(probe), "adapt"
    if name == "joint training":
        return _joint, "joint"
    if name == "fine-tuning, interpolated":
        return _maker({"strategies": [{"kind": "weight_interpolation"}], "training.lr": section.rates[1]}), "adapt"
    lr = rates[name.removeprefix("fine-tuning, ").removesuffix(" rate")]

    def stopped_early(spec: Any) -> Any:
        if spec.data.shots < 2:
            return with_fields(spec, {**plain, "training.lr": lr})
        every = max(1, spec.training.epochs // 20)
        early = {f"training.{key}": value for key, value in {**_EARLY, "evaluate_every": every}.items()}
        return with_fields(spec, {**plain, "training.lr": lr, "data.validation": 0.2, **early})

    return stopped_early, "adapt"


def _joint(spec: Any) -> Any:
    """As many epochs as make about the steps of adapting."""
    return with_fields(spec, {"strategies": [], "training.epochs": max(1, spec.training.epochs // 20)})


def _name(spec: SpeechSpec | VisionSpec) -> str:
    return " + ".join(strategy.label for strategy in spec.strategies) or "the spec"


def _same_labels(spec: SpeechSpec | VisionSpec) -> bool:
    """Whether source data can be trained on together with the target's."""
    apart = spec.data.kind == "digits" or getattr(spec.data, "source_root", None) is not None
    return spec.source.data is not None and not apart


def summarise(spec: SpeechSpec | VisionSpec, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tables of all runs: one for each number of shots, a row for each variant, in the order they were run.

    Returns:
        ``tables``: [{shots, best_baseline, rows: [{variant, baseline, target, source, harmonic, constrained, seconds,
        difference, wins}]}] with intervals as {mean, low, high, count}; ``per_target``; ``runs``; ``verdict``, a
        sentence for each table; ``left_out``, what could not be measured and why.
    """
    by_shots: dict[int, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_shots[run["shots"]][run["variant"]].append(run)
    tables = [_table(shots, variants) for shots, variants in sorted(by_shots.items())]
    left_out = []
    if any(run["after"]["source"] is None for run in runs):
        left_out.append("source kept, harmonic mean and constrained score: the source has no data to measure them on")
    return {
        "kind": "compare",
        "tables": tables,
        "verdict": [_verdict(table) for table in tables],
        "left_out": left_out,
        "runs": [dict(run) for run in runs],
        "spec": spec.model_dump(mode="json"),
    }


def _table(shots: int, variants: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    baselines: list[str] = [name for name in variants if name in BASELINES and name != "joint training"]
    score: dict[str, float] = {
        name: mean_interval([_score(run) for run in runs]).mean for name, runs in variants.items()
    }
    best = max(baselines, key=score.__getitem__) if baselines else None
    return {
        "shots": shots,
        "best_baseline": best,
        "rows": [_row(name, runs, variants[best] if best else ()) for name, runs in variants.items()],
    }


def _row(name: str, runs: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sourced = [run for run in runs if run["after"]["source"] is not None]
    four = [(r["before"]["target"], r["after"]["target"], r["before"]["source"], r["after"]["source"]) for r in sourced]
    other = {(run["target"], run["seed"]): _score(run) for run in best}
    pairs: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if (key := (run["target"], run["seed"])) in other:
            pairs[run["target"]].append(_score(run) - other[key])
    difference = bootstrap(list(pairs.values())) if pairs and best and runs is not best else None
    return {
        "variant": name,
        "baseline": name in BASELINES,
        "target": interval([run["after"]["target"] for run in runs]),
        "source": interval([run["after"]["source"] for run in sourced]),
        "harmonic": interval([_score(run) for run in sourced]),
        "constrained": constrained(four) if sourced else None,
        "seconds": interval([run["seconds"] for run in runs]),
        "difference": asdict(difference) if difference is not None else None,
        "wins": bool(difference is not None and difference.low > 0 and difference.count >= _ENOUGH),
        "per_target": {
            target: {
                "before": interval([run["before"]["target"] for run in runs if run["target"] == target]),
                "after": interval([run["after"]["target"] for run in runs if run["target"] == target]),
            }
            for target in dict.fromkeys(run["target"] for run in runs)
        },
    }


def _score(run: Mapping[str, Any]) -> float:
    """What decides: the harmonic mean of both domains, or the target where there is no source to measure."""
    after = run["after"]
    if after["source"] is None:
        return float(after["target"])
    return harmonic_mean([after["target"], after["source"]])


def _verdict(table: Mapping[str, Any]) -> str:
    """One sentence, plain where nothing wins."""
    where = f"At {table['shots']} {'shot' if table['shots'] == 1 else 'shots'} a class"
    own = [row for row in table["rows"] if not row["baseline"]]
    if table["best_baseline"] is None or not own:
        return f"{where} there is nothing to hold against each other."
    best = max(own, key=lambda row: (row["harmonic"] or row["target"])["mean"])
    what = "harmonic mean of target and source" if best["harmonic"] else "target accuracy"
    gap = best["difference"]
    said = f"{100 * gap['mean']:+.1f} points ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}) in the {what}"
    if best["wins"]:
        return f"{where} {best['variant']} beats the best baseline, {table['best_baseline']}: {said}."
    if gap["count"] < _ENOUGH:
        return f"{where} {gap['count']} paired runs are too few to tell: {best['variant']} is nearest, {said}."
    return (
        f"{where} nothing beats the best baseline, {table['best_baseline']}, beyond chance: the nearest is "
        f"{best['variant']}, {said}."
    )
