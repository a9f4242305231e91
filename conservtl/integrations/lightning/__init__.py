"""Lightning: a callback that carries out a plan in a ``Trainer``."""

from conservtl.integrations.lightning.callback import Conserve

__all__ = ["Conserve"]
