"""Means with intervals, and paired differences, over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from conservtl.extras import require

__all__ = ["Interval", "bootstrap", "constrained", "interval", "mean_interval"]

_DRAWS = 10_000  # resamples
_KAPPA = 0.03


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Args:
        mean: the mean.
        low: lower end; the mean itself if there is one value only.
        high: upper end.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, mean, mean, len(values))
    quantile = float(require("scipy.stats", "experiments").t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def interval(values: Sequence[float], least: float = -math.inf) -> dict[str, float] | None:
    """Return the mean with its interval, cut off at the least value there can be, as JSON; None without values."""
    if not values:
        return None
    found = asdict(mean_interval(values))
    return found | {"low": max(least, found["low"])}


def bootstrap(differences: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of the paired differences of each target, with its 95 % bootstrap interval (percentiles).

    A cluster bootstrap, since runs on one target are more alike than runs on several: it draws targets first, then
    runs of each (Davison and Hinkley 1997, section 3.8). With one target it draws runs only.
    """
    groups = [torch.tensor(list(group), dtype=torch.float64) for group in differences if len(group)]
    generator = torch.Generator().manual_seed(0)
    means, counts = torch.zeros(2, _DRAWS, dtype=torch.float64)
    for _ in groups:
        chosen = torch.randint(len(groups), (_DRAWS,), generator=generator)
        for number, group in enumerate(groups):
            places = chosen == number
            rows = torch.randint(len(group), (int(places.sum()), len(group)), generator=generator)
            means[places] += group[rows].sum(-1)
            counts[places] += len(group)
    resampled = means / counts
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    values = torch.cat(groups)
    return Interval(float(values.mean()), low, high, len(values))


def constrained(runs: Sequence[tuple[float, float, float, float]]) -> float:
    """Return the mean over runs of max(0, kappa - source degradation) / kappa times the share of target errors mended.

    Runs are accuracies in [0, 1]: target before, target after, source before, source after. Kappa is 3 points,
    absolute. 1: every target error is mended and the source loses nothing. A run whose source loses kappa or more
    counts 0.

    Reference:
        Mantena et al. 2022, arXiv 2210.03255.
    """
    values = []
    for target_before, target_after, source_before, source_after in runs:
        weight = max(0.0, _KAPPA - max(0.0, source_before - source_after)) / _KAPPA
        errors = 1 - target_before
        values.append(weight * ((target_after - target_before) / errors if errors > 0 else 0.0))
    return statistics.fmean(values)
