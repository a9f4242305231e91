"""Share of a model that the source gives: too little means wrong names or another model, and is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from conservtl.errors import SourceError, counted
from conservtl.layers import matches
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.source.entries import amount
from conservtl.source.read import Source
from conservtl.source.renaming import best_fit, missed

__all__ = ["MIN_SHARE", "check_coverage", "kept_note", "missed_note", "unused_note"]

MIN_SHARE = 0.1
"""Smallest share of the wanted parameters, by number of tensors and by number of values, that a source must give."""


_TELLING = 4  # tensors of one renaming; weight and bias of a layer of the same shape may be a coincidence


def check_coverage(
    plan: Plan, source: Source, model: Mapping[str, Tensor], declared: Collection[str], allow: Sequence[str]
) -> None:
    """Raise if the source gives almost nothing that the plan wants from it, or if other names give far more.

    Wanted are all parameters but those that are declared fresh, by the user or by a strategy, those that a strategy
    added, those allowed to differ, and a head for other labels. Refused is a source that gives less than
    ``MIN_SHARE`` of their tensors or of their values; or less than half of the values, where a prefix or renaming
    would give twice as many and more than half.
    """
    head = {name for name in plan.possible_head if plan[name].source_shape is not None}
    wanted = [
        row
        for row in plan.rows
        if not (row.added or row.name in declared or "origin" in row.chosen)
        and not (row.name in head and row.source_shape != row.shape)
        and not any(matches(glob, row.name) for glob in allow)
    ]
    found = [row for row in wanted if row.source_shape == row.shape]
    values = _values(found)
    if not wanted or 2 * values >= (every := _values(wanted)):
        return
    names = {row.name for row in wanted}
    fit = best_fit(source.tensors, {name: tensor for name, tensor in model.items() if name in names})
    better = fit is not None and fit.values > max(2 * values, every / 2)
    if not better and values >= MIN_SHARE * every and len(found) >= MIN_SHARE * len(wanted):
        return
    message = (
        f"{source.where}: most of what the plan takes from the source must be found there; of "
        f"{counted(len(wanted), 'tensor')} with {counted(every, 'value')} it gives "
        f"{len(found)} with {values:,}{_reason(wanted)}."
    )
    if fit is not None and fit.values > values:
        message += f" With {fit}, {counted(len(fit.names), 'tensor')} with {counted(fit.values, 'value')} fit."
    raise SourceError(
        f"{message} Rename the source's tensors (prefix=..., rename={{...}}; in a spec source.prefix, source.rename), "
        "declare what it does not have (fresh=[...]), or allow it (allow=['*'])."
    )


def unused_note(unused: Iterable[str], tensors: Mapping[str, Tensor], file: str | None = None) -> tuple[str, ...]:
    """Return a remark that counts the source tensors that were not used and names the largest; none if all were."""
    left = list(unused)
    where = f" in {file}" if file else ""
    return (
        (f"not used{where}: {len(left)} of {counted(len(tensors), 'tensor')}, {amount(left, tensors)}",) if left else ()
    )


def kept_note(kept: Sequence[str], model: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a remark on buffers that copied modules keep because the source lacks them; none if there are none."""
    if not kept:
        return ()
    shown = ", ".join(f"{name} {tuple(model[name].shape)}" for name in kept[:3]) + ", …" * (len(kept) > 3)
    own = "its own values" if len(kept) == 1 else "their own values"
    return (f"{counted(len(kept), 'buffer', 'keeps')} {own}, which the source does not have for them ({shown})",)


def missed_note(source: Source, model: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a remark on renamings that would find more of the model's tensors and lose none, if there are any."""
    fit = missed(source.tensors, model)
    more = 0 if fit is None else sum(name not in source.tensors for name in fit.names)
    return (f"with {fit}, {more} more tensors would be found",) if more >= _TELLING else ()


def _values(rows: Iterable[Row]) -> int:
    return sum(row.size for row in rows)


def _reason(wanted: Sequence[Row]) -> str:
    """Return the first difference in shape, where shapes are what most differ in."""
    other = [row for row in wanted if row.source_shape not in (None, row.shape)]
    if 2 * len(other) < len(wanted):
        return ""
    return f" ({len(other)} have another shape: {other[0].name!r} {other[0].source_shape} instead of {other[0].shape})"
