"""Tables of the recognizer's benchmark, made of its finished runs."""

from __future__ import annotations

import datetime as dt
import platform
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from conservtl import __version__
from conservtl.engine import harmonic_mean
from conservtl.experiments.studies.bootstrap import Interval, bootstrap

__all__ = ["BEFORE", "RECIPE", "SUTA", "TUNED_ON", "TUNING", "UNLABELLED", "tables"]

PARTS = ("target", "source")
BEFORE, RECIPE = "source as it is", "recipe"
UNLABELLED, SUTA = "recipe, 50 unlabelled", "50 unlabelled, entropy (SUTA)"
TUNING = (1000, 1001)
"""Seeds of the strings on which candidates of the recipe are compared."""
TUNED_ON = ("george", "jackson")
"""Speakers on whom they are compared."""
SPARED = 0.025
"""Source WER above the source model's that the choice of the recipe allows there."""


def harmonic(line: Mapping[str, Any]) -> float:
    """Return the harmonic mean of 1 - WER of target and source."""
    return harmonic_mean([max(0.0, 1 - line[name]) for name in ("target", "source")])


def percent(estimate: Interval, sign: str = "") -> str:
    """Return mean and interval in percent."""
    mean, low, high = (100 * value for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def grouped(values: Mapping[tuple[str, int], float]) -> Interval:
    """Return mean and bootstrap interval of (speaker, seed) -> value."""
    groups: dict[str, list[float]] = defaultdict(list)
    for (speaker, _), value in values.items():
        groups[speaker].append(value)
    return bootstrap(list(groups.values()))


def tables(lines: list[dict[str, Any]], methods: list[str], candidates: list[str]) -> str:
    """Return the tables of all runs.

    Args:
        lines: the runs.
        methods: in the order of the rows.
        candidates: of the recipe, likewise.
    """
    versions = f"conservtl {__version__}, torch {torch.__version__}, python {platform.python_version()}"
    out = ["# Digit strings: a recognizer adapted to one speaker\n"]
    out += [f"{platform.machine()}, CPU, 1 thread; {versions}; {dt.datetime.now(dt.UTC).date()}.\n"]
    out += ["Written by `benchmarks/transcribe.py`, whose docstring describes the method. The recipe is the fourth"]
    out += ["that ran on these strings: at 0.4 and 0.5 of the way, without KL on other voices, others ran before.\n"]
    for shots in dict.fromkeys(line["shots"] for line in lines):
        found: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
        for line in lines:
            if line["shots"] == shots and line["seed"] not in TUNING:
                found[line["method"]][line["speaker"], line["seed"]] = line
        out += table(shots, found, methods)
    out += of_candidates(lines, candidates)
    return "\n".join(out) + "\n"


def table(shots: int, found: Mapping[str, Mapping[tuple[str, int], dict[str, Any]]], methods: list[str]) -> list[str]:
    """Return the table of a number of shots, and what the recipe does for each speaker."""
    out = [f"## {shots} strings\n" if shots else "## No string with its text\n"]
    out += ["| | target WER | source WER | harmonic mean | the recipe is better by | s | seeds (runs) |"]
    out += ["| --- |" + " ---: |" * 6]
    mine = found.get(RECIPE, {})
    for name in (one for one in methods if one in found):
        runs = found[name]
        cells = [percent(grouped({key: run[part] for key, run in runs.items()})) for part in ("target", "source")]
        cells.append(percent(grouped({key: harmonic(run) for key, run in runs.items()})))
        pairs = {key: harmonic(mine[key]) - harmonic(run) for key, run in runs.items() if key in mine}
        cells.append("" if name == RECIPE or not pairs else percent(grouped(pairs), "+"))
        cells += [f"{statistics.median(run['seconds'] for run in runs.values()):.1f}", seeds_of(runs)]
        out.append(f"| {name} | {' | '.join(cells)} |")
    out.append("")
    pairs_of = [(found[BEFORE][key], run) for key, run in mine.items() if key in found.get(BEFORE, {})]
    new = [pair for pair in pairs_of if pair[1]["speaker"] not in TUNED_ON]
    for which, pairs in (("", pairs_of), (" of the speakers who had no part in its choice", new)):
        if pairs:
            before, after = ({part: mean(side, part) for part in PARTS} for side in zip(*pairs, strict=True))
            ratio, more = after["target"] / before["target"], 100 * (after["source"] - before["source"])
            out.append(
                f"Target WER{which} after the recipe: {ratio:.2f} of the source model's; source WER {more:+.1f}.\n"
            )
    if pairs_of:
        out += ["| speaker, before → after | target | source | part in the choice |", "| --- | ---: | ---: | --- |"]
    for speaker in dict.fromkeys(run["speaker"] for _, run in pairs_of):
        own = list(zip(*(pair for pair in pairs_of if pair[1]["speaker"] == speaker), strict=True))
        cells = [" → ".join(f"{100 * mean(side, part):.1f}" for side in own) for part in PARTS]
        out.append(f"| {speaker} | {' | '.join(cells)} | {'other strings' if speaker in TUNED_ON else 'none'} |")
    return [*out, ""] if pairs_of else out


def mean(runs: Iterable[Mapping[str, Any]], part: str) -> float:
    """Return the mean word error rate."""
    return statistics.fmean(run[part] for run in runs)


def seeds_of(runs: Mapping[tuple[str, int], Any]) -> str:
    """Return how many seeds the speakers have, and how many runs there are."""
    counts = Counter(speaker for speaker, _ in runs)
    low, high = min(counts.values()), max(counts.values())
    return f"{low if low == high else f'{low} to {high}'} ({len(runs)})"


def of_candidates(lines: list[dict[str, Any]], candidates: list[str]) -> list[str]:
    """Return the table of the recipe's candidates on the strings for tuning, one for each number of shots."""
    out: list[str] = []
    tuned = [line for line in lines if line["seed"] in TUNING and line["method"] in candidates]
    for shots in dict.fromkeys(line["shots"] for line in tuned):
        here = [line for line in tuned if line["shots"] == shots]
        out += [f"## Candidates of the recipe on {shots} strings, of other recordings than are reported\n"]
        out += ["Harmonic mean (target WER, source WER) at t of the way from the source to the trained weights. Bold:"]
        out += [f"the best whose source WER is at most {100 * SPARED:g} points above that at t = 0.\n"]
        paths = {name: [line["path"] for line in here if line["method"] == name] for name in candidates}
        found = {name: in_common(some) for name, some in paths.items() if some}
        points = sorted({t for runs in found.values() for t in runs}, key=float)
        out += [f"| t | {' | '.join(points)} | runs |", "| --- |" + " ---: |" * (len(points) + 1)]
        for name, runs in found.items():
            best = by_the_rule(runs)
            cells = [at_point(runs[t], bold=t == best) if t in runs else "" for t in points]
            out.append(f"| {name} | {' | '.join(cells)} | {len(paths[name])} |")
        out.append("")
    return out


def in_common(paths: list[dict[str, dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Return the scores of all runs at the points that all of them have."""
    return {t: [path[t] for path in paths] for t in paths[0] if all(t in path for path in paths)}


def by_the_rule(runs: Mapping[str, list[Mapping[str, float]]]) -> str:
    """Return the point with the best harmonic mean among those that spare the source.

    Args:
        runs: point -> scores of the runs there.
    """
    most = mean(runs["0"], "source") + SPARED
    allowed = [t for t, scores in runs.items() if mean(scores, "source") <= most]
    return max(allowed, key=lambda t: statistics.fmean(map(harmonic, runs[t])))


def at_point(runs: list[Mapping[str, float]], *, bold: bool) -> str:
    """Return the means of runs at a point."""
    rates = ", ".join(f"{100 * mean(runs, part):.1f}" for part in PARTS)
    text = f"{100 * statistics.fmean(map(harmonic, runs)):.1f} ({rates})"
    return f"**{text}**" if bold else text
