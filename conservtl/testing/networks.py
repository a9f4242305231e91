"""Small models of the usual kinds, each with an example input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["CLASSES", "TiedNetwork", "models"]

CLASSES = 3
"""Every model gives (4, CLASSES) scores."""
_BATCH = 4


class _Recurrent(nn.Module):
    def __init__(self, width: int, levels: int, bidirectional: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, width, levels, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(2 * width if bidirectional else width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0].mean(1))
        return scores


class TiedNetwork(nn.Module):
    """A word model whose output layer shares the embedding's weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of words (N, length)."""
        scores: Tensor = self.out(self.norm(self.mix(self.embed(x)).tanh()).mean(1))
        return scores


class _Shared(nn.Module):
    """A layer that runs twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.shared(self.shared(self.stem(x).tanh()).tanh()).tanh())
        return scores


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Any]:
    """Draw a model with an example of its input.

    Perceptrons with and without norms, convolutions with batch norm (with and without affine parameters), nested
    ``nn.Sequential``, LSTM classifiers, tied weights, and a layer that runs twice. All are in train mode
    and float32 and return (4, 3) scores.
    torch's random state is left as it was.

    Example:
        >>> from hypothesis import given, settings
        >>> from conservtl.testing import models
        >>> @settings(max_examples=5, deadline=None)
        ... @given(models())
        ... def test_it_returns_scores(drawn):
        ...     model, example = drawn
        ...     assert model(example).shape == (4, 3)
        >>> test_it_returns_scores()
    """
    make = draw(st.sampled_from([_perceptron, _convolutional, _nested, _recurrent, _tied, _shared]))
    build, example = make(draw)
    seed = draw(st.integers(0, 2**31 - 1))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build(), example()


_Made = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def _perceptron(draw: st.DrawFn) -> _Made:
    widths = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    norm = draw(st.sampled_from([None, nn.LayerNorm, nn.BatchNorm1d]))

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for before, width in zip([3, *widths], widths, strict=False):
            parts += [nn.Linear(before, width), *([norm(width)] if norm else []), nn.Tanh()]
        return nn.Sequential(*parts, nn.Linear(widths[-1], CLASSES))

    return build, lambda: torch.randn(_BATCH, 3)


def _convolutional(draw: st.DrawFn) -> _Made:
    channels = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    affine = draw(st.booleans())

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for before, width in zip([2, *channels], channels, strict=False):
            parts += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width, affine=affine), nn.ReLU()]
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], CLASSES))

    return build, lambda: torch.randn(_BATCH, 2, 5, 5)


def _nested(draw: st.DrawFn) -> _Made:
    depth = draw(st.integers(1, 3))

    def build() -> nn.Module:
        body: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        for _ in range(depth):
            body = nn.Sequential(body, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        return nn.Sequential(body, nn.Linear(4, CLASSES))

    return build, lambda: torch.randn(_BATCH, 3)


def _recurrent(draw: st.DrawFn) -> _Made:
    width, levels, both = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.booleans())
    return lambda: _Recurrent(width, levels, both), lambda: torch.randn(_BATCH, 5, 3)


def _tied(draw: st.DrawFn) -> _Made:
    width = draw(st.integers(2, 4))
    return lambda: TiedNetwork(width), lambda: torch.randint(CLASSES, (_BATCH, 5))


def _shared(draw: st.DrawFn) -> _Made:
    width = draw(st.integers(2, 4))
    return lambda: _Shared(width), lambda: torch.randn(_BATCH, 3)
