"""Statistics of each example by itself, mixed into those that a batch norm keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conservtl.errors import SourceError, SpecError
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import tracks_statistics

__all__ = ["check_mixable", "mix_instances", "mixable", "shares_of"]


class _Mix:
    r"""A pre-hook that shifts and scales each example, so that the norm behind it normalises by the mixture.

    With the norm's own mean and variance :math:`\mu, \sigma^2` and the mixture's :math:`\bar\mu, \bar\sigma^2`,

    .. math:: x' = \mu + (x - \bar\mu) \sqrt{\frac{\sigma^2 + \epsilon}{\bar\sigma^2 + \epsilon}}

    is normalised by the norm as x would be by the mixture, whatever else a subclass of it does.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, norm: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = args
        if norm.training or x.ndim < 3:  # it follows its batches; one value a channel has no variance
            return None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        variance, mean = torch.var_mean(wide, over, correction=0, keepdim=True)
        own_mean, own_variance = norm.running_mean.view(shape), norm.running_var.view(shape)
        mixed = torch.lerp(own_mean.expand_as(mean), mean, self.share)
        spread = torch.lerp(own_variance.expand_as(variance), variance, self.share)
        factor = ((own_variance + norm.eps) / (spread + norm.eps)).sqrt()
        return ((wide - mixed).mul(factor).add(own_mean).to(x.dtype), *others)


def mixable(module: nn.Module) -> bool:
    """Whether a module is a batch norm that keeps statistics; an instance norm has its examples' own already."""
    return isinstance(module, _BatchNorm) and tracks_statistics(module)


def check_mixable(plan: Plan, model: nn.Module, source: nn.Module | None = None) -> None:
    """Refuse a plan that mixes where the model has no such norm, or one that does not where the source does.

    Raises:
        SpecError: the model has none.
        SourceError: the source's weights alone would be another model.
    """
    by = [row.chosen["statistics"].by for row in plan.rows if row.instance]
    if by and not any(map(mixable, model.modules())):
        raise SpecError(
            f"{by[0]}: no batch norm of {type(model).__name__} keeps running statistics that each example's own could "
            "be mixed with. Use statistics='source', or another strategy."
        )
    if not by and source is not None and (shares := shares_of(source)):
        share = max(shares.values())
        raise SourceError(
            f"the source's norms mix in {share:.0%} of each example's own statistics, and the plan's do not, so its "
            "weights would be another model's. Add NormAdaptation(train='all', statistics='instance', "
            f"prior={1 / share - 1:.0f})."
        )


def mix_instances(shares: Mapping[nn.Module, float]) -> None:
    """Let norms mix in each example's own statistics, and others no longer.

    Args:
        shares: all batch norms that keep statistics -> the example's share, 0 for none.
    """
    for norm, share in shares.items():
        hooks = norm._forward_pre_hooks  # noqa: SLF001
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Mix)]:
            del hooks[key]
        if share:
            norm.register_forward_pre_hook(_Mix(share))


def shares_of(model: nn.Module) -> dict[str, float]:
    """Name of each norm that mixes in its examples' own statistics -> their share."""
    hooked = ((name, module._forward_pre_hooks.values()) for name, module in model.named_modules())  # noqa: SLF001
    return {name: hook.share for name, hooks in hooked for hook in hooks if isinstance(hook, _Mix)}
