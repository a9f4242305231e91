"""Linear interpolation between a source model and a model adapted from it (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from conservtl.bounds import is_number
from conservtl.errors import SourceError, SpecError
from conservtl.layers import check_globs, select, unwrap
from conservtl.source.read import Source, SourceLike, read_source
from conservtl.weights.checkpoints import Checkpoint

__all__ = [
    "RUNNING",
    "Statistics",
    "between",
    "check_same_labels",
    "check_statistics",
    "grid",
    "interpolate",
    "interpolation_path",
    "mixes",
    "share",
]

Statistics = Literal["interpolate", "adapted", "source"]
"""How running means and variances are treated: interpolated, or taken from one end."""
RUNNING = ("running_mean", "running_var")
"""Suffixes of the names of running statistics."""


def interpolate(
    source: SourceLike,
    adapted: SourceLike,
    t: float,
    *,
    batch_norm: Statistics = "interpolate",
    fresh: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Return weights between a source model and a model adapted from it, without training.

    .. math:: w = (1 - t)\, w^0 + t\, w^1

    The result is exact at both ends, and wherever both tensors are equal. Integer buffers (counts of batches,
    positions) are always the adapted model's.

    Running means and variances are interpolated like the weights, which is exact at the ends only: the variance of a
    mixture is not the mixture of the variances, and interpolated weights give norms inputs that neither set of
    statistics describes. ``recompute_statistics`` computes them for the data it is given; on target data alone, it
    loses the source's statistics.

    Args:
        source: w0: a path, a state dict or a model; a prefix of its names is stripped.
        adapted: w1; the result has its names, types and devices.
        t: 0 for the source, 1 for the adapted model.
        batch_norm: ``interpolate``, or the model whose running means and variances are copied.
        fresh: globs, or one glob, of tensors that are always the adapted model's, because only one model has them or
            their shapes differ (a head for other labels).

    Returns:
        A state dict of new tensors.

    Raises:
        SpecError: ``t`` is outside 0 to 1.
        SourceError: the models differ in a tensor that is not in ``fresh``, or are the same object.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, adapted = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> between = ctl.interpolate(source, adapted, 0.5)
        >>> torch.allclose(between["weight"], (source.weight + adapted.weight) / 2)
        True
    """
    if not is_number(t) or not 0 <= t <= 1:
        raise SpecError(f"t must be between 0 (the source) and 1 (the adapted model); received {t!r:.60}.")
    check_statistics(batch_norm)
    start, end = _ends(source, adapted, fresh)
    return _all_between(start, end, t, batch_norm)


def interpolation_path(
    source: SourceLike,
    adapted: SourceLike,
    points: int = 11,
    *,
    batch_norm: Statistics = "interpolate",
    fresh: str | Sequence[str] = (),
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Return weights at evenly spaced points from a source model to a model adapted from it, without training.

    Args:
        source: as for ``interpolate``.
        adapted: as for ``interpolate``.
        points: number of points, both ends included.
        batch_norm: as for ``interpolate``.
        fresh: as for ``interpolate``.

    Returns:
        An iterator of (t, state dict) from t = 0 to t = 1; each state dict is made when it is requested.

    Raises:
        SpecError: fewer than two points.
        SourceError: the models differ in a tensor that is not in ``fresh``.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, adapted = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> [t for t, weights in ctl.interpolation_path(source, adapted, points=3)]
        [0.0, 0.5, 1.0]
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise SpecError(f"points must be at least 2, for the two ends; received {points!r:.60}.")
    check_statistics(batch_norm)
    start, end = _ends(source, adapted, fresh)
    return ((t, _all_between(start, end, t, batch_norm)) for t in grid(points))


def grid(points: int) -> tuple[float, ...]:
    """Return this number of evenly spaced values from 0 to 1."""
    return tuple(number / (points - 1) for number in range(points))


def between(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return a new tensor (1 - t) start + t end, with the device and type of ``end``; integers copy ``end``."""
    start = start.to(end.device)
    if t == 1 or not mixes(end):
        return end.clone()
    if t == 0:
        return start.to(end.dtype, copy=True)
    wide = torch.promote_types(end.dtype, torch.float32)
    a, b = start.to(wide), end.to(wide)
    # Equal values stay exactly equal, and infinities of a mask do not become NaN.
    return torch.where(a == b, b, torch.lerp(a, b, t)).to(end.dtype)


def _ends(
    source: SourceLike, adapted: SourceLike, fresh: str | Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of both ends by name: the source's without the fresh ones, and all of the adapted model's."""
    check_globs("fresh", fresh, text=True)
    fresh = (fresh,) if isinstance(fresh, str) else fresh
    if isinstance(source, nn.Module) and isinstance(adapted, nn.Module) and unwrap(source) is unwrap(adapted):
        raise SourceError(
            "source and adapted are one and the same model. Adapting changes a model in place: pass the source's "
            "original weights, from a file or a copy."
        )
    last, first = read_source(adapted), read_source(source)
    if not fresh:
        check_same_labels(first, last)
    end = last.tensors
    start = first.matched(end).tensors
    names = [*end, *(name for name in start if name not in end)]
    excluded = {name for matched in select(fresh, names, "tensor").values() for name in matched}
    for name in names:
        if name in excluded:
            continue
        if name not in start or name not in end:
            owner = "adapted" if name in end else "source"
            raise SourceError(
                f"both models must have each tensor; {name!r} is in the {owner} model only. Interpolate models of the "
                f"same structure, or exclude the tensor: fresh=[{name!r}]."
            )
        if start[name].shape != end[name].shape:
            raise SourceError(
                f"both models must have one shape for each tensor; {name!r} has shape {tuple(start[name].shape)} in "
                f"the source and {tuple(end[name].shape)} in the adapted model. Exclude it: fresh=[{name!r}]."
            )
    return {name: tensor for name, tensor in start.items() if name in end and name not in excluded}, end


def check_same_labels(one: Source | Checkpoint, other: Source | Checkpoint) -> None:
    """Raise if two models that runs saved have other labels: equal rows of their heads would mean different ones."""
    labels, others = ([str(label) for label in (each.run or {}).get("labels", ())] for each in (one, other))
    if labels and others and labels != others:
        raise SourceError(
            "models must have the same labels in one order, or rows of their heads mean different ones; "
            f"{one.where} has {', '.join(labels[:12])}, and {other.where} {', '.join(others[:12])}. Mix models of the "
            "same labels; interpolate can exclude the head, by its name (fresh=['head.*'])."
        )


def _all_between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], t: float, batch_norm: Statistics
) -> dict[str, Tensor]:
    return {
        name: between(start[name], tensor, share(name, t, batch_norm)) if name in start else tensor.clone()
        for name, tensor in end.items()
    }


def share(name: str, t: float, batch_norm: Statistics) -> float:
    """Return the position t for one tensor: running statistics may be taken from an end."""
    if batch_norm == "interpolate" or not name.endswith(RUNNING):
        return t
    return 1.0 if batch_norm == "adapted" else 0.0


def mixes(tensor: Tensor) -> bool:
    """Return whether tensors of this type can be interpolated; integers cannot."""
    return tensor.is_floating_point() or tensor.is_complex()


def check_statistics(batch_norm: str) -> None:
    """Raise if running statistics are to be treated in no known way."""
    if batch_norm not in get_args(Statistics):
        raise SpecError(f"batch_norm must be one of {get_args(Statistics)}; received {batch_norm!r}.")
