"""Models in situations that strategies overlook: frozen parts, tied heads, layerdrop, several outputs, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from conservtl.testing.networks import CLASSES, TiedNetwork

__all__ = [
    "SITUATIONS",
    "frozen_parts",
    "layer_drops",
    "masked_batches",
    "several_outputs",
    "tied_heads",
]

_BATCH = 4
_FRAMES = 5


class _Frozen(nn.Module):
    """A layer that asks for no gradient, and a table of positions that asks for none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.fixed, self.body = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)
        self.table = nn.Parameter(torch.randn(1, 3), requires_grad=False)
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.fixed(self.stem(x + self.table).tanh()).tanh()).tanh())
        return scores


class _Dropping(nn.Module):
    """A layer that runs in eval mode only, as one that layerdrop leaves out of a training step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.dropped, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).tanh()
        scores: Tensor = self.head(hidden if self.training else hidden + self.dropped(hidden).tanh())
        return scores


class _Several(nn.Module):
    """Two heads on one body."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(3, width), nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.first(hidden), self.second(hidden)


class _Masked(nn.Module):
    """Frames of which ``attention_mask`` says which count: the scores are of their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        frames = self.body(self.stem(x).tanh()).tanh()
        counts = attention_mask.unsqueeze(2).to(frames)
        scores: Tensor = self.head((frames * counts).sum(1) / counts.sum(1))
        return scores


def _masked(width: int) -> tuple[nn.Module, Any]:
    """Return a model of padded sequences, and a batch of which the last frames of most rows are padding."""
    mask = torch.arange(_FRAMES) < torch.tensor([[2], [3], [4], [5]])
    return _Masked(width), {"x": torch.randn(_BATCH, _FRAMES, 3), "attention_mask": mask.long()}


SITUATIONS: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "frozen parts": lambda width: (_Frozen(width), torch.randn(_BATCH, 3)),
    "a tied head": lambda width: (TiedNetwork(width), torch.randint(CLASSES, (_BATCH, _FRAMES))),
    "a layer that does not run in a step": lambda width: (_Dropping(width), torch.randn(_BATCH, 3)),
    "several outputs": lambda width: (_Several(width), torch.randn(_BATCH, 3)),
    "padding": _masked,
}
"""What a model has -> a function of its width that returns the model and an example."""


@st.composite
def _drawn(draw: st.DrawFn, what: str) -> tuple[nn.Module, Any]:
    width, seed = draw(st.integers(2, 4)), draw(st.integers(0, 2**31 - 1))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return SITUATIONS[what](width)


def frozen_parts() -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw models of which a layer and a table ask for no gradient, each with an example.

    Example:
        >>> from hypothesis import given, settings
        >>> import conservtl as ctl
        >>> @settings(max_examples=5, deadline=None)
        ... @given(frozen_parts())
        ... def test_they_stay_frozen(drawn):
        ...     model, example = drawn
        ...     assert ctl.adapt(model, model.state_dict(), example=example).plan["fixed.weight"].as_found
        >>> test_they_stay_frozen()
    """
    return _drawn("frozen parts")


def tied_heads() -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw models whose head shares the weight of their embedding, each with an example.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(tied_heads())
        ... def test_the_head_is_the_embedding(drawn):
        ...     assert drawn[0].out.weight is drawn[0].embed.weight
        >>> test_the_head_is_the_embedding()
    """
    return _drawn("a tied head")


def layer_drops() -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw models with a layer that does not run in train mode, each with an example.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(layer_drops())
        ... def test_it_has_no_gradient(drawn):
        ...     model, example = drawn
        ...     model(example).sum().backward()
        ...     assert model.dropped.weight.grad is None
        >>> test_it_has_no_gradient()
    """
    return _drawn("a layer that does not run in a step")


def several_outputs() -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw models that return the scores of two heads, each with an example.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(several_outputs())
        ... def test_there_are_two(drawn):
        ...     model, example = drawn
        ...     assert [scores.shape for scores in model(example)] == [(4, 3), (4, 3)]
        >>> test_there_are_two()
    """
    return _drawn("several outputs")


def masked_batches() -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw models of padded sequences, each with a batch ``{"x": ..., "attention_mask": ...}``.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(masked_batches())
        ... def test_padding_does_not_count(drawn):
        ...     model, batch = drawn
        ...     other = batch | {"x": batch["x"] + (1 - batch["attention_mask"].unsqueeze(2))}
        ...     assert torch.equal(model(**batch), model(**other))
        >>> test_padding_does_not_count()
    """
    return _drawn("padding")
