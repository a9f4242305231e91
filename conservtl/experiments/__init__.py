"""Whole runs from a spec: data, source model, adaptation, measurement, report."""
