"""Momentum of a fused SGD for parameters that are trained later than others of their group."""

from __future__ import annotations

import torch

__all__ = ["begin_momentum"]


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a momentum of zero to parameters that get their first gradient, as torch's fused SGD takes all or none.

    Without dampening a step from zero equals the first step, which copies the gradient. Other optimizers are left
    alone.
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        moving = [one for one in group["params"] if one.grad is not None]
        fresh = [one for one in moving if optimizer.state[one].get("momentum_buffer") is None]
        if len(fresh) < len(moving):
            for parameter in fresh:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
