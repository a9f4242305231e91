"""The task's sections of a spec. Each field has its bounds in its type and its description below it."""

from typing import Literal

from conservtl.bounds import Count, NonNegative
from conservtl.spec_model import FrozenModel
from conservtl.tasks.base import DataSection

Sensor = Literal["slow clock", "muffled", "mains hum"]


class PitchModel(FrozenModel):
    """A small convolutional network."""

    width: Count = 16
    """Channels of its convolutions."""


class PitchData(DataSection):
    """Hums made up by a formula, recorded by a good sensor (the source) and by a worse one (the target)."""

    target: Sensor = "slow clock"
    """The sensor to adapt to."""
    noise: NonNegative = 0.1
    """Standard deviation of the noise in every recording."""
    source_hums: Count = 512
    """Recordings of the good sensor to train a source model on."""
