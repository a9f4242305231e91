"""``FeatureConservation``."""

from conservtl.methods.feature_conservation.strategy import FeatureConservation

__all__ = ["FeatureConservation"]
