"""An exponential average of the weights over a run's steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from conservtl.kernels.dtensor import from_part, local, place_like
from conservtl.layers import named_parameters, unwrap

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""The average of the weights and of the norms' statistics.

    .. math:: \bar w_0 = w_0, \qquad \bar w_k = d\,\bar w_{k-1} + (1 - d)\,w_k \text{ after step } k

    Args:
        model: the model that is trained, at its starting point, on its device.
        trained: names of the parameters that are trained in some phase; the others need no average.
        decay: d, at least 0 and less than 1.
    """

    def __init__(self, model: nn.Module, trained: frozenset[str], decay: float) -> None:
        parameters = {name: each for name, each in named_parameters(model).items() if name in trained}
        buffers = {name: each for name, each in unwrap(model).named_buffers() if each.is_floating_point()}
        self._live: dict[str, Tensor] = {**parameters, **buffers}
        self._average = {name: local(tensor.detach()).clone() for name, tensor in self._live.items()}
        self._lerp: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._lerp(list(self._average.values()), [local(tensor.detach()) for tensor in self._live.values()], None)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model."""
        for name, tensor in self._live.items():
            local(tensor.detach()).copy_(self._average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a block."""
        weights = {name: local(tensor.detach()).clone() for name, tensor in self._live.items()}
        self.apply()
        try:
            yield
        finally:
            for name, tensor in self._live.items():
                local(tensor.detach()).copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, sharded like the parameters."""
        return {name: from_part(tensor, self._live[name], tensor.dtype) for name, tensor in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore an average that ``state_dict`` returned."""
        for name, tensor in self._average.items():
            tensor.copy_(local(place_like(state[name], self._live[name], tensor.dtype)))
