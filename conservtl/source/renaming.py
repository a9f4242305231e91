"""Names of source tensors: a prefix that is removed, regular expressions that are replaced, and what would fit."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from conservtl.errors import SourceError, SpecError, did_you_mean

__all__ = ["Fit", "Shapes", "best_fit", "check_unique", "cuts", "known_prefixes", "missed", "names_after"]

Shapes = Mapping[str, tuple[int, ...]]
_Key = TypeVar("_Key")

_PREFIXES = ("module.", "model.")  # torch.compile's prefix is removed before: names are canonical
_SYNONYMS = (("gamma", "weight"), ("beta", "bias"))  # of norms, in weights converted from TensorFlow
_DEEP = 2  # leading components that a renaming may replace
_TRIED = 12  # words of each side that are tried as renamings
_RULES = 4  # renamings of one suggestion


@dataclass(frozen=True)
class Fit:
    """A prefix or renamings under which source tensors would fit a model.

    Args:
        prefix: for ``prefix``, or None.
        rename: for ``rename``.
        names: names of the model's tensors that would be found with their shape.
        values: number of their values.
    """

    prefix: str | None
    rename: dict[str, str]
    names: frozenset[str]
    values: int

    def __str__(self) -> str:
        said = [f"prefix={self.prefix!r}"] if self.prefix else []
        said += [f"rename={self.rename!r}"] if self.rename else []
        return ", ".join(said)


def names_after(
    names: Iterable[str], where: str, prefix: str | None = None, rename: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return old name -> new name, without the names that do not begin with the prefix.

    Args:
        names: of source tensors.
        where: name of the source in messages.
        prefix: removed; a missing dot at its end is added, and so is ``module.`` or ``model.`` before it.
        rename: regular expression -> replacement, applied in order wherever it matches.

    Raises:
        SourceError: nothing begins with the prefix, an expression matches nothing, or two names become one.
        SpecError: an expression is not valid.
    """
    new = {name: name for name in names}
    if prefix:
        start = _prefix_of(new, prefix, where)
        new = {name: name.removeprefix(start) for name in new if name.startswith(start) and name != start}
    for expression, replacement in (rename or {}).items():
        try:
            pattern = re.compile(expression)
            if not any(pattern.search(name) for name in new.values()):
                first = next(iter(new.values()))
                raise SourceError(
                    f"{where}: rename must match names of the source; {expression!r} matches none of {len(new)}, of "
                    f"which the first is {first!r}. Correct the expression or leave it out."
                )
            new = {name: pattern.sub(replacement, current) for name, current in new.items()}
        except (re.error, IndexError) as error:
            raise SpecError(
                f"rename must map regular expressions to replacements; {expression!r}: {replacement!r} is not valid: "
                f"{error}."
            ) from error
    check_unique(new, where)
    return new


def check_unique(names: Mapping[str, str], where: str) -> None:
    """Raise if two names become one."""
    first_of: dict[str, str] = {}
    for name, new in names.items():
        if new in first_of:
            raise SourceError(
                f"{where}: names must be unique; {first_of[new]!r} and {name!r} both mean {new!r}. Remove one of them "
                "and pass the state dict."
            )
        first_of[new] = name


def known_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes to try, shortest first: none, and each sequence of known prefixes that occurs."""
    names = list(names)
    prefixes = [""]
    for prefix in prefixes:
        longer = [prefix + known for known in _PREFIXES]
        prefixes += [p for p in longer if p.count(".") <= 3 and any(name.startswith(p) for name in names)]
    return sorted(prefixes, key=len)


def missed(source: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Fit | None:
    """Return renamings that find more of a model's tensors and lose none; None if there are none."""
    unused = {name: tensor for name, tensor in source.items() if name not in model}
    missing = {name: tensor for name, tensor in model.items() if name not in source}
    shapes = {tuple(tensor.shape) for tensor in unused.values()}
    if not any(tuple(tensor.shape) in shapes for tensor in missing.values()):
        return None
    fit = best_fit(unused, missing)
    if fit is None or fit.prefix is not None:
        return None
    theirs, own = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (source, model))
    current = {name: name for name in theirs}
    before = _fit(None, {}, current, theirs, own)
    for expression, replacement in fit.rename.items():
        current = {name: re.sub(expression, replacement, now) for name, now in current.items()}
    after = _fit(None, fit.rename, current, theirs, own)
    return after if before.names < after.names else None


def best_fit(source: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Fit | None:
    """Return the prefix or renaming under which most of a model's values would be found; None if none helps."""
    theirs = {name: tuple(tensor.shape) for name, tensor in source.items()}
    own = {name: tuple(tensor.shape) for name, tensor in model.items()}
    current = {name: name for name in theirs}
    best = _fit(None, {}, current, theirs, own)
    begin = best.values
    for prefix in _common(_stripped(theirs, own)):
        renamed = {name: name.removeprefix(prefix) for name in theirs if name.startswith(prefix)}
        fit = _fit(prefix, {}, renamed, theirs, own)
        if fit.values > best.values:
            best, current = fit, renamed
    while len(best.rename) < _RULES:
        found = best
        for expression, replacement in _renamings(current, theirs, own):
            renamed = {name: re.sub(expression, replacement, now) for name, now in current.items()}
            fit = _fit(best.prefix, {**best.rename, expression: replacement}, renamed, theirs, own)
            if (fit.values, len(fit.names)) > (found.values, len(found.names)):
                found, following = fit, renamed
        if found is best:
            break
        best, current = found, following
    return best if best.values > begin else None


def _prefix_of(names: Iterable[str], prefix: str, where: str) -> str:
    """Return the prefix with its dot."""
    names = list(names)
    dotted = prefix if prefix.endswith(".") else f"{prefix}."
    for outer in known_prefixes(names):
        for start in (outer + dotted, outer + prefix):
            if any(name.startswith(start) for name in names):
                return start
    known = dict.fromkeys(".".join(name.split(".")[: prefix.strip(".").count(".") + 1]) for name in names)
    raise SourceError(
        f"{where}: prefix must begin names of the source; none of {len(names)} begins with {prefix!r}."
        f"{did_you_mean(prefix, known) or ' The first is ' + repr(names[0]) + '.'}"
    )


def _fit(prefix: str | None, rename: dict[str, str], current: Mapping[str, str], theirs: Shapes, own: Shapes) -> Fit:
    found = frozenset(now for name, now in current.items() if own.get(now) == theirs[name])
    return Fit(prefix, rename, found, sum(math.prod(own[name]) for name in found))


def _stripped(theirs: Shapes, own: Shapes) -> Iterator[tuple[str, int]]:
    """Yield prefixes without which a name is one of the model's, with the values found so."""
    for name, shape in theirs.items():
        for head, tail in cuts(name):
            if own.get(tail) == shape:
                yield head, math.prod(shape)


def _renamings(current: Mapping[str, str], theirs: Shapes, own: Shapes) -> Iterator[tuple[str, str]]:
    """Yield renamings worth trying: leading components added or replaced, and words that only one side has."""
    now = {new: theirs[name] for name, new in current.items()}
    added = (
        (head, math.prod(shape)) for name, shape in own.items() for head, tail in cuts(name) if now.get(tail) == shape
    )
    yield from (("^", head) for head in _common(added))
    ends: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for name, shape in own.items():
        for head, tail in cuts(name, _DEEP):
            ends[tail].append((head, shape))
    replaced = (
        ((head, other), math.prod(shape))
        for name, shape in now.items()
        for head, tail in cuts(name, _DEEP)
        for other, own_shape in ends[tail]
        if head != other and own_shape == shape
    )
    yield from ((f"^{re.escape(head)}", other) for head, other in _common(replaced))
    missing, unused = own.keys() - now.keys(), now.keys() - own.keys()
    words = {word for name in unused for word in name.split(".")}
    yield from ((rf"\b{word}\b", other) for word, other in _SYNONYMS if word in words)
    for part, end in ((str, r"\b"), (_stem, r"(?=\d)")):
        here, there = _only(unused, own, part), _only(missing, now, part)
        yield from ((rf"\b{re.escape(word)}{end}", other) for word in here for other in there)


def _only(names: Iterable[str], others: Iterable[str], part: Callable[[str], str]) -> list[str]:
    """Return the commonest parts of the words of some names that the words of other names do not have."""
    count, known = (
        Counter(part(word) for name in some for word in name.split(".") if not word.isdigit())
        for some in (names, others)
    )
    return [word for word, _ in count.most_common() if word and word not in known][:_TRIED]


def _stem(word: str) -> str:
    """Return a word without the number at its end; empty if there is none."""
    stem = word.rstrip("0123456789")
    return stem if stem != word else ""


def _common(votes: Iterable[tuple[_Key, int]]) -> list[_Key]:
    """Return the three keys with most votes."""
    count: Counter[_Key] = Counter()
    for key, weight in votes:
        count[key] += weight
    return [key for key, _ in count.most_common(3)]


def cuts(name: str, most: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield a name cut at each of its dots, or at the first few."""
    parts = name.split(".")
    for place in range(1, len(parts) if most is None else min(len(parts), most + 1)):
        yield ".".join(parts[:place]) + ".", ".".join(parts[place:])
