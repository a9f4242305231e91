"""The straight line between a starting point and what was trained from it (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from conservtl.errors import SourceError, SpecError
from conservtl.layers import select, unwrap
from conservtl.source.read import SourceLike, read_source

__all__ = ["RUNNING", "Statistics", "between", "grid", "interpolate", "interpolation_path", "mixes", "share"]

Statistics = Literal["interpolate", "adapted", "source"]
"""What becomes of running means and variances on the line."""
RUNNING = ("running_mean", "running_var")
"""How the names of running statistics end."""


def interpolate(
    source: SourceLike,
    adapted: SourceLike,
    t: float,
    *,
    batch_norm: Statistics = "interpolate",
    fresh: Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Weights between a source model and a model adapted from it, without any training.

    .. math:: w = (1 - t)\, w^0 + t\, w^1

    Exact at both ends, and wherever the two are equal. Integer buffers (batches counted, positions) are the adapted
    model's throughout.

    Running means and variances are interpolated like the weights. That is exact at the ends, and no more: the
    variance of a mixture is not the mixture of the variances, and what reaches a norm in between is the output of
    weights that neither set of statistics has seen. But they then stand between both domains, as the weights do.
    ``recompute_statistics`` makes them right for the data it is given, and for no other: on the target's alone it
    gives up the source wherever the two differ in them.

    Args:
        source: w0: a path, a state dict or a model; a prefix of its names is stripped.
        adapted: w1; its names, types and devices are the result's.
        t: 0 is the source, 1 the adapted model.
        batch_norm: ``interpolate``, or whose running means and variances are taken as they are.
        fresh: globs of tensors that only one of the two has, or has otherwise (a head for other labels): they are the
            adapted model's throughout.

    Returns:
        A state dict of new tensors.

    Raises:
        SpecError: ``t`` is outside 0 to 1.
        SourceError: the two hold different tensors, beside those in ``fresh``; or are one and the same model.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, adapted = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> between = ctl.interpolate(source, adapted, 0.5)
        >>> torch.allclose(between["weight"], (source.weight + adapted.weight) / 2)
        True
    """
    _check(t, batch_norm)
    start, end = _ends(source, adapted, fresh)
    return _all_between(start, end, t, batch_norm)


def interpolation_path(
    source: SourceLike,
    adapted: SourceLike,
    points: int = 11,
    *,
    batch_norm: Statistics = "interpolate",
    fresh: Sequence[str] = (),
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The whole line from a source model to a model adapted from it: what is gained and lost, without training.

    Args:
        source: as ``interpolate`` takes it.
        adapted: likewise.
        points: how many, evenly spaced, both ends included.
        batch_norm: likewise.
        fresh: likewise.

    Returns:
        (t, state dict) from t = 0 to t = 1, each made when it is asked for.

    Raises:
        SpecError: fewer than two points.
        SourceError: the two hold different tensors, beside those in ``fresh``.
    """
    if points < 2:
        raise SpecError(f"points: a path has two ends, so at least 2 points; received {points}.")
    _check(0.0, batch_norm)
    start, end = _ends(source, adapted, fresh)
    return ((t, _all_between(start, end, t, batch_norm)) for t in grid(points))


def grid(points: int) -> tuple[float, ...]:
    """So many values from 0 to 1, evenly spaced."""
    return tuple(number / (points - 1) for number in range(points))


def between(start: Tensor, end: Tensor, t: float) -> Tensor:
    """A new tensor (1 - t) start + t end on the end's device and in its type; no integers, those are the end's."""
    start = start.to(end.device)
    if t == 1 or not mixes(end):
        return end.clone()
    if t == 0:
        return start.to(end.dtype, copy=True)
    wide = torch.promote_types(end.dtype, torch.float32)
    a, b = start.to(wide), end.to(wide)
    # Where both are equal the value stays to the bit, and an infinity in a mask does not become NaN.
    return torch.where(a == b, b, torch.lerp(a, b, t)).to(end.dtype)


def _ends(source: SourceLike, adapted: SourceLike, fresh: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both ends by name: where the line starts, without what is fresh, and all of where it ends."""
    if isinstance(source, nn.Module) and isinstance(adapted, nn.Module) and unwrap(source) is unwrap(adapted):
        raise SourceError(
            "source and adapted are one and the same model. Adapting changes a model in place: pass the source's "
            "weights as they were, from a file or a copy."
        )
    end = read_source(adapted).tensors
    start = read_source(source).matched(end).tensors
    names = [*end, *(name for name in start if name not in end)]
    apart = {name for found in select(fresh, names, "tensor").values() for name in found}
    for name in names:
        if name in apart:
            continue
        if name not in start or name not in end:
            one = "adapted" if name in end else "source"
            raise SourceError(
                f"{name!r} stands in the {one} model only, and a line needs both ends. Interpolate models of the same "
                f"structure, or say what is new: fresh=[{name!r}]."
            )
        if start[name].shape != end[name].shape:
            raise SourceError(
                f"{name!r} has shape {tuple(start[name].shape)} in the source and {tuple(end[name].shape)} in the "
                f"adapted model, so there is no line between the two. Say what is new: fresh=[{name!r}]."
            )
    return {name: tensor for name, tensor in start.items() if name in end and name not in apart}, end


def _all_between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], t: float, batch_norm: Statistics
) -> dict[str, Tensor]:
    return {
        name: between(start[name], tensor, share(name, t, batch_norm)) if name in start else tensor.clone()
        for name, tensor in end.items()
    }


def share(name: str, t: float, batch_norm: Statistics) -> float:
    """How far along the line one tensor is taken."""
    if batch_norm == "interpolate" or not name.endswith(RUNNING):
        return t
    return 1.0 if batch_norm == "adapted" else 0.0


def mixes(tensor: Tensor) -> bool:
    """Whether there is anything between two tensors of this type; there is not between integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _check(t: float, batch_norm: str) -> None:
    if not 0 <= t <= 1:
        raise SpecError(f"t must be between 0 (the source) and 1 (the adapted model); received {t}.")
    if batch_norm not in get_args(Statistics):
        raise SpecError(f"batch_norm must be one of {get_args(Statistics)}; received {batch_norm!r}.")
