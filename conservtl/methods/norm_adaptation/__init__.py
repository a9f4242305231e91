"""``NormAdaptation``."""

from conservtl.methods.norm_adaptation.strategy import NormAdaptation

__all__ = ["NormAdaptation"]
