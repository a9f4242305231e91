"""Intervals that cover, and scores by their formula."""

from __future__ import annotations

import random
import statistics

import pytest

from conservtl.experiments.studies.bootstrap import bootstrap, constrained, interval, mean_interval


def test_mean_interval_is_students():
    """By hand: mean 3, standard error 1.5811 / sqrt 5, the quantile of 4 degrees of freedom 2.7764."""
    found = mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * 1.5811388 / 5**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert interval([0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 1}
    assert interval([]) is None


def test_the_intervals_cover_in_19_of_20_cases():
    draw = random.Random(0)
    samples = [[draw.gauss(1, 2) for _ in range(8)] for _ in range(300)]
    covered = sum(found.low <= 1 <= found.high for found in map(mean_interval, samples))
    assert 0.92 < covered / 300 < 0.98


def test_bootstrap_resamples_targets_and_their_runs():
    """Runs on one target that agree with each other do not make two targets that differ any surer."""
    few = bootstrap([[0.0] * 2, [1.0] * 2])
    many = bootstrap([[0.0] * 50, [1.0] * 50])
    assert (few.low, few.high) == (many.low, many.high) == (0.0, 1.0)
    assert many.mean == 0.5
    assert many.count == 100


def test_bootstrap_of_one_target_is_the_plain_one():
    draw = random.Random(1)
    values = [draw.gauss(0, 1) for _ in range(40)]
    found = bootstrap([values])
    error = statistics.stdev(values) / 40**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert bootstrap([values]) == found


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ((0.8, 1.0, 0.99, 0.99), 1.0),  # everything mended, nothing lost
        ((0.8, 0.9, 0.99, 0.975), 0.25),  # half mended, half of what may be lost is
        ((0.8, 1.0, 0.99, 0.95), 0.0),  # lost more than kappa
        ((0.8, 0.7, 0.99, 1.0), -0.5),  # worse on the target; a gain on the source is no loss
        ((1.0, 1.0, 0.9, 0.9), 0.0),  # there was nothing to mend
    ],
)
def test_constrained_score(run, expected):
    assert constrained([run]) == pytest.approx(expected)
