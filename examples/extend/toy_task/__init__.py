"""A task of your own: the pitch of a hum, heard by sensors that distort it. Importing it makes it known to specs.

conservtl run examples/extend/toy_task/spec.yaml --import examples/extend/toy_task --out runs/pitch
"""

from toy_task.task import Pitch

__all__ = ["Pitch"]
