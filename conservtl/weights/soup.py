"""Model soups: the mean of models adapted from one source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from conservtl.errors import SourceError, SpecError
from conservtl.source.read import SourceLike, read_source
from conservtl.weights.interpolation import between, check_same_labels

__all__ = ["mean_of", "soup"]

State = dict[str, Tensor]


def soup(models: Sequence[SourceLike], *, score: Callable[[State], float] | None = None) -> State:
    """Return the mean of models adapted from the same source: of all, or of those that improve it.

    Without ``score``, the uniform soup: the mean of all. With ``score``, the greedy soup: the models are tried in the
    order of their scores, and each is added if the mean with it scores no worse than the mean without it.

    Running means and variances are averaged like the weights; use ``recompute_statistics`` to compute them for the
    averaged weights. Integer buffers are those of the first model (uniform) or the best model (greedy).

    Args:
        models: at least two paths, state dicts or models.
        score: state dict -> score on validation data, higher is better; called once for each model, and once more
            for each but the best.

    Returns:
        A state dict of new tensors, with the types and devices of the first (uniform) or best (greedy) model.

    Raises:
        SpecError: fewer than two models.
        SourceError: the models differ in names or shapes of tensors.

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
        raise SpecError(f"models must be a list of at least 2 models; received {count}.")
    if score is not None and not callable(score):
        raise SpecError(f"score must be a function of a state dict; received {score!r:.60}. Pass one, or leave it out.")
    read = [read_source(model) for model in models]
    for other in read[1:]:
        check_same_labels(read[0], other)
    first = read[0].tensors
    states = [first, *(other.matched(first).tensors for other in read[1:])]
    _check(states)
    if score is None:
        return _mean(states)
    scores = [score({name: tensor.clone() for name, tensor in state.items()}) for state in states]
    order = sorted(range(len(states)), key=lambda number: scores[number], reverse=True)
    chosen, best = [states[order[0]]], scores[order[0]]
    mean = _mean(chosen)
    for number in order[1:]:
        candidate = _mean([*chosen, states[number]])
        value = score(candidate)
        if value >= best:
            chosen, best, mean = [*chosen, states[number]], value, candidate
    return mean


def _mean(states: Sequence[State]) -> State:
    """Return the mean; equal values stay exactly equal."""
    return {name: mean_of([state[name] for state in states]) for name in states[0]}


def mean_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the mean of tensors in the type of the first; equal values stay exactly equal."""
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
            expected, received = (tuple(known[name]) if name in known else "none" for known in (first, shapes))
            if expected != received:
                raise SourceError(
                    f"models: {name!r} must have one shape in all models; received {expected} in the first and "
                    f"{received} in model {place}. Pass models of one structure."
                )
