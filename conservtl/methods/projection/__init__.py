"""``Projection``."""

from conservtl.methods.projection.strategy import Projection

__all__ = ["Projection"]
