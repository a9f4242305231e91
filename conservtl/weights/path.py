"""A model moved along the line between its start and what was trained, and left where it is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from conservtl.kernels.dtensor import place_like
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.weights.interpolation import RUNNING, Statistics, between, grid, mixes, share

__all__ = ["WeightPath"]


Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[int, Field(ge=2)]


class WeightPath:
    """The line on which a model's weights can be moved, in place, from where they started to where they are now.

    Args:
        model: wrapped or not; its weights as they are now are the line's end.
        start: name -> tensor where the line starts. What is not in it stays as it is.
        batch_norm: what becomes of running means and variances.
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
        # Statistics that did not come from the source stay, but a refresh writes into them.
        self._start = {n: start.get(n, value) for n, value in end.items() if n in start or n.endswith(RUNNING)}
        self._end = {name: end[name] for name in self._start}
        self._live = {name: tensors[name] for name in self._start}
        self._batch_norm, self._refresh = batch_norm, refresh

    @torch.no_grad()
    def move(self, t: float) -> None:
        """Lay the weights at ``t`` into the model."""
        for name, tensor in self._live.items():
            end = self._end[name]
            tensor.copy_(between(place_like(self._start[name], end), end, share(name, t, self._batch_norm)))
        if self._refresh is not None and 0 < t < 1:
            self._refresh()

    def choose(self, points: int, score: Callable[[], float], margin: float = 0.0) -> tuple[float, dict[float, float]]:
        """Move to the middle of the points around the best that score no worse than it.

        A few validation examples are soon all right: the first point where they are is one where much of the test
        part is still wrong, and the last is the end of the line.

        Args:
            points: how many to try, evenly spaced.
            score: () -> score of the model as it is, higher is better.
            margin: differences up to this are chance.

        Returns:
            The t moved to, and t -> score.
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
