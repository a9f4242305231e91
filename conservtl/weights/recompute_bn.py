"""Recomputation of the running statistics of norms for changed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from conservtl.errors import DataError, SpecError
from conservtl.functions import Forward
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.runtime.freezing import tracks_statistics
from conservtl.runtime.measuring import Placed
from conservtl.runtime.model_hooks import hooked
from conservtl.runtime.preserve import eval_mode

__all__ = ["recompute_statistics"]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any], forward: Forward = plain_forward) -> None:
    """Recompute the running means and variances of all norms for the model's current weights.

    Each becomes the plain average over the batches, independent of its old value and of the norm's momentum. All other
    modules are in eval mode meanwhile, so dropout is off. Modes, momenta and the counts of batches are restored.
    Frozen norms are recomputed too.

    Args:
        model: changed in place. A model without such norms stays unchanged.
        batches: batches that ``forward`` accepts; each is moved to the model's device.
        forward: (model, batch) -> outputs.

    Raises:
        DataError: ``batches`` is empty.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization", section 3.2.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module; received {type(model).__name__}.")
    norms: list[Any] = [module for module in unwrap(model).modules() if tracks_statistics(module)]
    if not norms:
        return
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    seen = False
    try:
        with hooked([norm.register_forward_pre_hook(_averaging()) for norm in norms]), eval_mode(model):
            for norm in norms:
                norm.training = True  # assigned, because train() of a frozen norm stays in eval mode
            for batch in Placed(batches, norms[0].running_mean.device):
                forward(model, batch)
                seen = True
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
    if not seen:
        raise DataError("batches must not be empty: there are no batches to compute statistics on. Pass some.")


def _averaging() -> Callable[[nn.Module, Any], None]:
    """Return a pre-hook that gives each call of a norm the same share in its statistics, also for a norm used twice."""
    calls = 0

    def hook(norm: Any, _: Any) -> None:
        nonlocal calls
        if not calls:
            # Of the class, because a frozen norm refuses; and an infinite old value times 0 would be NaN.
            type(norm).reset_running_stats(norm)
        calls += 1
        norm.momentum = 1 / calls

    return hook
