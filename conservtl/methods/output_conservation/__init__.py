"""``OutputConservation``."""

from conservtl.methods.output_conservation.divergence import cross_entropy_to_source, kl_to_source, squared_to_source
from conservtl.methods.output_conservation.strategy import OutputConservation
from conservtl.methods.output_conservation.term import OutputConservationTerm

__all__ = [
    "OutputConservation",
    "OutputConservationTerm",
    "cross_entropy_to_source",
    "kl_to_source",
    "squared_to_source",
]
