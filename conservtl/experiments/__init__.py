"""Whole runs from a spec: data, source model, adaptation, measurement, report."""

from __future__ import annotations

from conservtl.experiments.bundle import Adapted, Prediction, load
from conservtl.experiments.recipes import Recipe, recipe
from conservtl.experiments.recommend import Recommendation, recommend

__all__ = ["Adapted", "Prediction", "Recipe", "Recommendation", "load", "recipe", "recommend"]
