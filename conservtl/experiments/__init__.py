"""Whole runs from a spec: data, source model, adaptation, measurement, report."""

from __future__ import annotations

from conservtl.experiments.bundle import Adapted, Prediction, load

__all__ = ["Adapted", "Prediction", "load"]
