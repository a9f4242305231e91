"""Whole runs from a spec: data, source model, adaptation, measurement, report."""

from __future__ import annotations

from conservtl.experiments.advice.recommendation import Recommendation, recommend
from conservtl.experiments.run.bundle import Adapted, load_adapted
from conservtl.experiments.spec.recipes import Recipe, recipe
from conservtl.tasks.base import Prediction

__all__ = ["Adapted", "Prediction", "Recipe", "Recommendation", "load_adapted", "recipe", "recommend"]
