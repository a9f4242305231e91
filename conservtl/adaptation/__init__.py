"""The plan bound to a model: ``adapt`` prepares it, ``Adaptation`` carries it out."""

from conservtl.adaptation.adaptation import Adaptation, Origin
from conservtl.adaptation.prepare import adapt

__all__ = ["Adaptation", "Origin", "adapt"]
