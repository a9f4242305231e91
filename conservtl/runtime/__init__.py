"""Carry out a plan on a model: optimizer groups, the step hook, terms, updates and measurements."""
