"""Whole runs from a spec: data, source model, adaptation, measurement, report."""

from __future__ import annotations

from conservtl.experiments.bundle import Adapted, Prediction, load
from conservtl.experiments.recommend import Recommendation, recommend

__all__ = ["Adapted", "Prediction", "Recommendation", "load", "recommend"]
