"""The plan bound to a model: ``adapt`` prepares an ``Adaptation``, which carries it out."""

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.origin import Origin
from conservtl.adaptation.prepare import adapt

__all__ = ["Adaptation", "Origin", "adapt"]
