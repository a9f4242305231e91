"""``FeatureExtraction``."""

from conservtl.methods.feature_extraction.strategy import FeatureExtraction

__all__ = ["FeatureExtraction"]
