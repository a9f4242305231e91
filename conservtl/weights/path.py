"""Moves of a model along the line between its starting point and its trained weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from conservtl.kernels.dtensor import place_like
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.weights.interpolation import RUNNING, Statistics, between, grid, mixes, share

__all__ = ["WeightPath"]


class WeightPath:
    """The line from a starting point to a model's current weights, along which the model can be moved in place.

    Args:
        model: wrapped or not; its current weights are the end of the line.
        start: name -> tensor at the start of the line. Other tensors do not move.
        batch_norm: how running means and variances are treated.
        refresh: called after each move to a point between the ends.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        batch_norm: Statistics = "interpolate",
        refresh: Callable[[], None] | None = None,
    ) -> None:
        buffers = {canonical(name): buffer for name, buffer in unwrap(model).named_buffers()}
        tensors: dict[str, Tensor] = {**named_parameters(model), **buffers}
        end = {name: tensor.detach().clone() for name, tensor in tensors.items() if mixes(tensor)}
        # Statistics without a start do not move, but a refresh overwrites them.
        self._start = {n: start.get(n, value) for n, value in end.items() if n in start or n.endswith(RUNNING)}
        self._end = {name: end[name] for name in self._start}
        self._live = {name: tensors[name] for name in self._start}
        self._batch_norm, self._refresh = batch_norm, refresh

    @torch.no_grad()
    def move(self, t: float) -> None:
        """Set the model's weights to those at ``t``."""
        for name, tensor in self._live.items():
            end = self._end[name]
            tensor.copy_(between(place_like(self._start[name], end), end, share(name, t, self._batch_norm)))
        torch.clear_autocast_cache()  # the caller's autocast may hold the weights of another point
        if self._refresh is not None and 0 < t < 1:
            self._refresh()

    def choose(self, points: int, score: Callable[[], float], margin: float = 0.0) -> tuple[float, dict[float, float]]:
        """Move to the middle of the neighbouring points whose score is the best one, up to the margin.

        Few validation examples reach the best score at many points: at the first of these points, many test examples
        are still wrong, and the last is often the end of the line.

        Returns:
            The chosen t, and t -> score for all points.
        """
        scores = {}
        for t in grid(points):
            self.move(t)
            value = score()
            scores[t] = -math.inf if math.isnan(value) else value
        tried, least = list(scores), max(scores.values()) - margin
        first = last = max(range(points), key=lambda place: scores[tried[place]])
        while first > 0 and scores[tried[first - 1]] >= least:
            first -= 1
        while last < points - 1 and scores[tried[last + 1]] >= least:
            last += 1
        chosen = tried[(first + last + 1) // 2]
        self.move(chosen)
        return chosen, scores
