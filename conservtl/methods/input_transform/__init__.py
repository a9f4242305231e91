"""``InputTransform``."""

from conservtl.methods.input_transform.strategy import InputTransform

__all__ = ["InputTransform"]
