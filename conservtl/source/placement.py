"""The one prefix to remove from source names, or to put before them, under which nearly all of them are a model's."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from conservtl.errors import SourceError, counted
from conservtl.source.renaming import Shapes, cuts, known_prefixes

__all__ = ["Placement", "find_placement"]

_NEARLY_ALL = 0.8  # of the names under both prefixes: position tables may have another size
_HALF = 0.5  # of all names of the smaller side: a prefix that few names share says nothing about the source
_AS_WELL = 0.9  # of the best placement's names: another that finds as many is a choice for the user


@dataclass(frozen=True)
class Placement:
    """A prefix to remove and one to put in its place.

    Args:
        strip: prefix of source names to remove; empty: none.
        put: prefix of the model's names to put before them; empty: none.
        fits: source name -> name of the model's tensor of the same shape.
    """

    strip: str
    put: str
    fits: Mapping[str, str]

    def __str__(self) -> str:
        parts = [f"without the prefix {self.strip!r}"] if self.strip else []
        parts += [f"under {self.put!r}"] if self.put else []
        return " and ".join(parts)

    @property
    def option(self) -> str:
        """The argument of ``adapt`` that asks for it."""
        if not self.put:
            return f"prefix={self.strip!r}"
        return f"rename={ {f'^{re.escape(self.strip)}': self.put}!r}"

    def names(self, source: Iterable[str], plain: Iterable[str]) -> dict[str, str]:
        """Return source name -> new name, without names that lack the prefix to remove.

        Args:
            source: all names of the source.
            plain: names that are the model's as they are, such as a head's beside the submodule; they stay.
        """
        stay = set(plain) - self.fits.keys()
        return {
            name: name if name in stay else self.put + name.removeprefix(self.strip)
            for name in source
            if name in stay or name.startswith(self.strip)
        }


def find_placement(
    source: Mapping[str, Tensor], model: Mapping[str, Tensor], same: Mapping[str, int], where: str
) -> Placement | None:
    """Return the placement under which nearly all names fit with equal shapes; None if there is none or no need.

    No need is where half of the names are the model's as they are. A placement removes any prefix (a full model's
    ``bert.`` for a bare encoder), or puts one of the model's before the names (an encoder in a classifier), then
    without ``module.`` and ``model.`` too. Nearly all are 80 % of the names under its prefixes, of the source or of the
    model, whichever has fewer, and half of all names of one of them.

    Args:
        source: name -> tensor.
        model: name -> tensor of the model.
        same: name -> number of the model's tensor, equal for names of a tied one.
        where: name of the source in messages.

    Raises:
        SourceError: two placements fit as well and differ in what they give to which tensor; the message names both.
    """
    theirs, own = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (source, model))
    plain = {name for name, shape in theirs.items() if own.get(name) == shape}
    fewest = _HALF * min(len(theirs), len(own))
    if len(plain) >= fewest:
        return None
    found: list[Placement] = []
    for (strip, put), votes in Counter(_votes(theirs, own)).items():
        group = min(sum(name.startswith(start) for name in side) for side, start in ((theirs, strip), (own, put)))
        if votes >= fewest and votes >= _NEARLY_ALL * group:
            new = {name: put + name.removeprefix(strip) for name in theirs if name.startswith(strip)}
            fits = {name: other for name, other in new.items() if own.get(other) == theirs[name]}
            found.append(Placement(strip, put, fits))
    found.sort(key=lambda one: (-len(one.fits), len(one.strip) + len(one.put)))
    if not found:
        return None
    best = found[0]
    for other in found[1:]:
        if len(other.fits) >= _AS_WELL * len(best.fits) and _differ(best, other, source, same):
            raise SourceError(
                f"{where}: its names must fit the model in one way; {best} they give {len(best.fits)} of the model's "
                f"{counted(len(own), 'tensor')}, and {other} {len(other.fits)}. Choose: {best.option}, or "
                f"{other.option} (in a "
                "spec, source.prefix and source.rename)."
            )
    names = best.names(theirs, plain)
    return best if len(set(names.values())) == len(names) else None  # two claim one name: nothing is chosen for them


def _votes(theirs: Shapes, own: Shapes) -> Iterator[tuple[str, str]]:
    """Yield (prefix to remove, prefix to put) for each source name that they make one of the model's, by shape."""
    inside: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in own.items():
        for head, tail in cuts(name):
            inside[tail, shape].append(head)
    wrappers = known_prefixes(theirs)
    for name, shape in theirs.items():
        yield from ((head, "") for head, tail in cuts(name) if own.get(tail) == shape)
        for strip in (prefix for prefix in wrappers if name.startswith(prefix)):
            yield from ((strip, put) for put in inside[name.removeprefix(strip), shape] if put != strip)


def _differ(one: Placement, other: Placement, source: Mapping[str, Tensor], same: Mapping[str, int]) -> bool:
    """Return whether two placements give a tensor of the source, or of the model, to different ones of the other."""
    pairs = {same[own]: source[name] for name, own in one.fits.items()}
    if any(same[one.fits[name]] != same[own] for name, own in other.fits.items() if name in one.fits):
        return True
    return any(not _is_same(source[name], pairs.get(same[own], source[name])) for name, own in other.fits.items())


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one: a state dict has two for the names of a tied one."""
    if one is other:
        return True
    place = (one.data_ptr(), one.shape, one.stride(), one.dtype)
    return not one.is_meta and place == (other.data_ptr(), other.shape, other.stride(), other.dtype)
