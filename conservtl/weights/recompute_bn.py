"""Running statistics of norms, computed anew for weights that were never trained with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from conservtl.errors import DataError
from conservtl.functions import Forward
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.runtime.freezing import tracks_statistics
from conservtl.runtime.measuring import Placed
from conservtl.runtime.preserve import eval_mode

__all__ = ["recompute_statistics"]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any], forward: Forward = plain_forward) -> None:
    """Compute the running means and variances of all norms anew, for the weights that the model has now.

    Each becomes the plain average over the batches, whatever the norm's momentum; nothing of the old value is left.
    Everything else is in eval mode meanwhile, so nothing is dropped out; modes, momenta and the counts of batches
    are afterwards as they were. Norms that are frozen are computed too.

    Args:
        model: changed in place. A model without such norms stays as it is.
        batches: (inputs, labels) or what ``forward`` takes; moved to the model's device one by one.
        forward: (model, batch) -> outputs.

    Raises:
        DataError: there are no batches.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization", section 3.2.
    """
    norms: list[Any] = [module for module in unwrap(model).modules() if tracks_statistics(module)]
    if not norms:
        return
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    hooks = [norm.register_forward_pre_hook(_averaging()) for norm in norms]
    seen = False
    try:
        with eval_mode(model):
            for norm in norms:
                norm.training = True  # set, not train(): that of a frozen norm stays in eval mode
            for batch in Placed(batches, norms[0].running_mean.device):
                forward(model, batch)
                seen = True
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
    if not seen:
        raise DataError("there are no batches to compute statistics on. Give some, to be gone through again.")


def _averaging() -> Callable[[nn.Module, Any], None]:
    """A pre-hook that gives each call of a norm the same share in its statistics, a norm used twice included."""
    calls = 0

    def hook(norm: Any, _: Any) -> None:
        nonlocal calls
        if not calls:
            norm.reset_running_stats()  # an old value may be infinite, and times 0 that is NaN
        calls += 1
        norm.momentum = 1 / calls

    return hook
