"""Model soups: the mean of several models that were adapted from one source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from conservtl.errors import SourceError, SpecError
from conservtl.source.read import SourceLike, read_source
from conservtl.weights.interpolation import between

__all__ = ["soup"]

State = dict[str, Tensor]


def soup(models: Sequence[SourceLike], *, score: Callable[[State], float] | None = None) -> State:
    """One model out of several that were adapted from the same source: their mean, or that of the best of them.

    Without ``score`` the uniform soup, the mean of all. With it the greedy one: the models in the order of their own
    scores, each added where the mean with it scores no worse than the mean without.

    Running means and variances are averaged like the weights; ``recompute_statistics`` makes them right for the
    mean's own weights on the data it is given.
    Integer buffers are those of the first model, in the greedy soup of the best.

    Args:
        models: two or more paths, state dicts or models.
        score: state dict -> score on a validation part, higher is better; called once for each model, and once more
            for each but the best.

    Returns:
        A state dict of new tensors, in the types and on the devices of the first (the best) model.

    Raises:
        SpecError: fewer than two models.
        SourceError: they hold different tensors.

    Reference:
        Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", section 2 and recipe 1.

    Example:
        >>> import torch, conservtl as ctl
        >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> mixed = ctl.soup([one, other])
        >>> torch.allclose(mixed["bias"], (one.bias + other.bias) / 2)
        True
    """
    if not isinstance(models, Sequence) or isinstance(models, str) or len(models) < 2:
        count = len(models) if isinstance(models, (list, tuple)) else type(models).__name__
        raise SpecError(f"models: a soup is made of a list of at least 2 models; received {count}.")
    first = read_source(models[0]).tensors
    states = [first, *(read_source(model).matched(first).tensors for model in models[1:])]
    _check(states)
    if score is None:
        return _mean(states)
    own = [score({name: tensor.clone() for name, tensor in state.items()}) for state in states]
    order = sorted(range(len(states)), key=lambda number: own[number], reverse=True)
    kept, best = [states[order[0]]], own[order[0]]
    mean = _mean(kept)
    for number in order[1:]:
        tried = _mean([*kept, states[number]])
        found = score(tried)
        if found >= best:
            kept, best, mean = [*kept, states[number]], found, tried
    return mean


def _mean(states: Sequence[State]) -> State:
    """The mean; where all are equal it is that value to the bit."""
    return {name: _mean_of([state[name] for state in states]) for name in states[0]}


def _mean_of(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    wide = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
    mean = first.to(wide, copy=True)
    for number, tensor in enumerate(others, 2):
        mean = between(tensor, mean, (number - 1) / number)
    return mean.to(first.dtype)


def _check(states: Sequence[State]) -> None:
    first = {name: tensor.shape for name, tensor in states[0].items()}
    for place, state in enumerate(states[1:], 2):
        shapes = {name: tensor.shape for name, tensor in state.items()}
        for name in [*first, *shapes]:
            one, other = (tuple(found[name]) if name in found else "none" for found in (first, shapes))
            if one != other:
                raise SourceError(
                    f"models: {name!r} must have one shape in all of them, but it has {one} in the first and {other} "
                    f"in model {place}. A soup takes models of one structure."
                )
