"""The data that a task loads: labelled examples of two domains, and how many to adapt with."""

from conservtl.data.domains import Augmentation, Domains, Preprocessing
from conservtl.data.draws import carve, draw_shots
from conservtl.data.examples import Data, Examples, first_batch, join, length_of, spread, take
from conservtl.data.renumbering import renumber
from conservtl.data.sequences import Sequences

__all__ = [
    "Augmentation",
    "Data",
    "Domains",
    "Examples",
    "Preprocessing",
    "Sequences",
    "carve",
    "draw_shots",
    "first_batch",
    "join",
    "length_of",
    "renumber",
    "spread",
    "take",
]
