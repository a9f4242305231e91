"""``LHUC``."""

from conservtl.methods.lhuc.strategy import LHUC

__all__ = ["LHUC"]
