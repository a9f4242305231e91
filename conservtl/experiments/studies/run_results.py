"""Results of many runs together: those that repeat another, and what all of them say."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from conservtl.tasks.bad_files import skipped_report

__all__ = ["distinct", "over_all", "repeats", "taken_over"]

_ROUNDING = 1e-3  # relative: sums in another order differ by less after training, other batches by more


def taken_over(runs: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return the fewest, the most and the mean number of examples that a class of any run had; None: not known."""
    counts = [count for run in runs for count in (run.get("taken") or {}).values()]
    return {"fewest": min(counts), "most": max(counts), "mean": fmean(counts)} if counts else None


def distinct(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a variant's runs without those that repeat another."""
    kept: list[Mapping[str, Any]] = []
    for run in runs:
        if not any(repeats(run, one) for one in kept):
            kept.append(run)
    return kept


def repeats(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two runs of a variant on one target end in the same weights and scores, but for rounding.

    Results of before do not say where their weights ended, and count as different.
    """
    if run is other:
        return True
    if run["target"] != other["target"] or not {"weights"} <= run.keys() & other.keys():
        return False
    ends = [
        one["weights"] | {f"{when} {name}": one[when][name] for when in ("before", "after") for name in one[when]}
        for one in (run, other)
    ]
    return ends[0].keys() == ends[1].keys() and all(
        value == ends[1][name]
        or (None not in (value, ends[1][name]) and math.isclose(value, ends[1][name], rel_tol=_ROUNDING))
        for name, value in ends[0].items()
    )


def _alike(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether several runs of a variant are one run for each target."""
    return len(distinct(runs)) == len({run["target"] for run in runs}) < len(runs)


def over_all(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a study's result says of all its runs.

    Returns:
        ``rows_by_label``, how many rows of a layer were copied by label in some of the runs; ``repeated``, the
        variants of which the seeds changed nothing; ``skipped``, the files that some runs skipped; ``runs``, without
        these files.
    """
    reports = [run["skipped"] for run in runs if run.get("skipped")]
    files = {entry["file"]: entry["reason"] for report in reports for entry in report["files"]}
    skipped = skipped_report(files)
    trained: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        if run.get("steps"):
            trained[f"{run['variant']} {run['shots']}"].append(run)
    repeated = (each[0]["variant"] for each in trained.values() if _alike(each))
    return {
        "repeated": list(dict.fromkeys(repeated)),
        "rows_by_label": list(dict.fromkeys(said for run in runs for said in run.get("rows_by_label", ()))),
        "skipped": skipped | {"count": max([skipped["count"], *(report["count"] for report in reports)])},
        "runs": [{key: value for key, value in run.items() if key != "skipped"} for run in runs],
    }
