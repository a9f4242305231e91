"""Detection of divergence: the run stops and names the batch, the step or the weights."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from conservtl.engine.batch import Batch, examples_of
from conservtl.engine.checkpoint import State
from conservtl.errors import TrainingDivergedError

__all__ = ["Losses", "check_weights"]

_LOOK = 50  # steps between two reads of the losses on a GPU: each waits for the device
_ADVICE = "The last good checkpoint is kept; lower training.lr, set training.clip"


class Losses:
    """Sums up an epoch's losses, and stops the run at one that is not finite.

    Args:
        state: its ``total`` and ``seen`` are updated at each read.
        device: on a GPU the losses of many steps are read together.
    """

    def __init__(self, state: State, device: torch.device) -> None:
        self.state = state
        self._every = 1 if device.type == "cpu" else _LOOK
        self._waiting: list[tuple[Tensor, Batch, int, int]] = []

    def add(self, loss: Tensor, batch: Batch, number: int, step: int) -> None:
        """Add the mean loss of a batch.

        Args:
            loss: scalar, with the batch's share in it.
            batch: its size and index are kept.
            number: position of the batch in its epoch, from 1.
            step: the step that the batch is a part of, from 1.
        """
        # Without its content, whose memory is free again.
        self._waiting.append((loss.detach(), replace(batch, content=None), number, step))
        if len(self._waiting) >= self._every:
            self.look()

    def look(self) -> None:
        """Read and sum up the losses that were added since the last read.

        Raises:
            TrainingDivergedError: a loss is NaN or infinite.
        """
        waiting, self._waiting = self._waiting, []
        values = torch.stack([loss.float() for loss, *_ in waiting]).tolist() if waiting else []
        for value, (_, batch, number, step) in zip(values, waiting, strict=True):
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"the loss is {value} at batch {number} of epoch {self.state.epoch + 1} (step {step}"
                    f"{examples_of(batch, ', examples {}')}). {_ADVICE}, or inspect that batch."
                )
            self.state.total += value * batch.weight
            self.state.seen += batch.weight


@torch.no_grad()
def check_weights(parameters: Mapping[str, nn.Parameter], step: int, penalised: Container[str] = ()) -> None:
    """Raise unless all trained parameters are finite: an infinite gradient shows in them before it shows in a loss.

    Args:
        parameters: name -> parameter.
        step: number of steps done.
        penalised: names of the parameters with a penalty of the user's own.

    Raises:
        TrainingDivergedError: a parameter is not finite; the message names it.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            starts = step == 1 and name in penalised
            more = ", or check the gradient of a penalty of your own where w = w0" if starts else ""
            raise TrainingDivergedError(f"{name!r} is not finite after step {step}. {_ADVICE}{more}.")
