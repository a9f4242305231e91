"""Whole runs from a spec: data, source model, adaptation, measurement, report."""

from __future__ import annotations

from conservtl.experiments.advice.lr_range_test import RangeTest, lr_find
from conservtl.experiments.advice.recommendation import Recommendation, recommend
from conservtl.experiments.own.studies import compare, sweep
from conservtl.experiments.publishing.save import save
from conservtl.experiments.results import Comparison, Sweep
from conservtl.experiments.run.adapted import Adapted
from conservtl.experiments.run.bundle import load_adapted
from conservtl.experiments.spec.recipes import Recipe, recipe
from conservtl.tasks.base import Prediction

__all__ = [
    "Adapted",
    "Comparison",
    "Prediction",
    "RangeTest",
    "Recipe",
    "Recommendation",
    "Sweep",
    "compare",
    "load_adapted",
    "lr_find",
    "recipe",
    "recommend",
    "save",
    "sweep",
]
