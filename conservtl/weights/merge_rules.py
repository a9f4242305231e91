"""Rules that mix one tensor of a source with those of models adapted from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conservtl.weights.interpolation import between
from conservtl.weights.soup import mean_of

__all__ = ["RULES", "Rule"]

Mix = Callable[[Tensor, Sequence[Tensor], float, float], Tensor]


@dataclass(frozen=True)
class Rule:
    """A way to mix checkpoints.

    Args:
        mix: (source, models, t, density) -> tensor of the first model's type.
        least: fewest models.
        t: default of t; None: it must be given.
        high: largest t.
        fixed: whether t is always its default.
    """

    mix: Mix
    least: int = 1
    t: float | None = None
    high: float = 1.0
    fixed: bool = False


def _interpolate(source: Tensor, models: Sequence[Tensor], t: float, _: float) -> Tensor:
    return between(source, mean_of(models), t)


def _task_arithmetic(source: Tensor, models: Sequence[Tensor], t: float, _: float) -> Tensor:
    start, *ends = _wide(source, *models)
    return _moved(start, ends, t * sum(end - start for end in ends), models[0])


def _ties(source: Tensor, models: Sequence[Tensor], t: float, density: float) -> Tensor:
    start, *ends = _wide(source, *models)
    trimmed = torch.stack([_largest(end - start, density) for end in ends])
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    mean = torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp(min=1)
    return _moved(start, ends, t * mean, models[0])


def _model_stock(source: Tensor, models: Sequence[Tensor], _t: float, _d: float) -> Tensor:
    start, *ends = (tensor.flatten() for tensor in _wide(source, *models))
    changes = [end - start for end in ends]
    cosines = [_cosine(one, other) for one, other in itertools.combinations(changes, 2)]
    cosine, count = max(0.0, sum(cosines) / len(cosines)), len(models)
    return between(source, mean_of(models), count * cosine / (1 + (count - 1) * cosine))


def _wide(*tensors: Tensor) -> list[Tensor]:
    wide = torch.promote_types(tensors[1].dtype, torch.float32) if tensors[1].dtype.itemsize > 1 else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def _moved(start: Tensor, ends: Sequence[Tensor], change: Tensor | float, like: Tensor) -> Tensor:
    """Return start + change in a model's type; where all are equal, infinities of a mask among them, that value."""
    same = torch.stack([end == start for end in ends]).all(0)
    return torch.where(same, start, start + change).to(like.dtype)


def _largest(change: Tensor, density: float) -> Tensor:
    """Return a change with all but this share of its values, the largest ones, set to 0."""
    keep = round(density * change.numel())
    if keep >= change.numel():
        return change
    flat = torch.zeros_like(change).flatten()
    kept = change.abs().flatten().topk(max(1, keep)).indices
    flat[kept] = change.flatten()[kept]
    return flat.reshape(change.shape)


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two changes; 1 if both are 0, 0 if one is."""
    norms = [float(torch.linalg.vector_norm(each)) for each in (one, other)]
    if not all(norms):
        return 0.0 if any(norms) else 1.0
    return float(torch.vdot(one / norms[0], other / norms[1]).real)


RULES: Mapping[str, Rule] = {
    "interpolate": Rule(_interpolate),
    "wise_ft": Rule(_interpolate),
    "soup": Rule(_interpolate, least=2, t=1.0, fixed=True),
    "model_stock": Rule(_model_stock, least=2, t=1.0, fixed=True),
    "task_arithmetic": Rule(_task_arithmetic, high=2.0),
    "ties": Rule(_ties, high=2.0),
}
"""Every rule by its name; the docstring of ``merge`` gives formulas and papers."""
