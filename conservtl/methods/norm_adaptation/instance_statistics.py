"""Statistics of each example by itself, mixed into those that a batch norm keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conservtl.bounds import Fraction
from conservtl.errors import SpecError
from conservtl.labels import argument_names
from conservtl.layers import Layer, canonical, layer_of, named_parameters
from conservtl.layers.extended import ExtendedModule, extend_module, restore_module
from conservtl.layers.plain import plain_module
from conservtl.padding import names_padding
from conservtl.plan.decision import Extension
from conservtl.runtime.freezing import keeps_batch_statistics
from conservtl.runtime.padding_watch import PaddingWatch

__all__ = ["InstanceMixing", "InstanceStatistics", "PaddedModel"]


class InstanceStatistics(Extension):
    """Batch norms normalise by a mixture of the statistics they keep and those of each example."""

    kind: Literal["instance_statistics"] = "instance_statistics"
    share: Fraction
    """Share of the example's own statistics; the rest is that of the statistics the norm keeps."""
    names: tuple[str, ...]
    """Parameters from the source. Their norms mix, and so do norms without parameters in their layers."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: an example's statistics are those of its padding too."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"statistics {1 - self.share:.0%} as kept, {self.share:.0%} of each example, in batch norms"

    def check(self, model: nn.Module) -> None:
        """Raise unless the model has a batch norm that keeps statistics."""
        if not any(map(keeps_batch_statistics, model.modules())):
            raise SpecError(
                f"{self.by}: no batch norm of {type(model).__name__} keeps running statistics that each example's own "
                "could be mixed with. Use statistics='source', or another strategy."
            )

    def extend(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Let the norms mix. A norm is found by its parameters, by its own name, or by its layer's parameters."""
        chosen = set(self.names)
        names = {id(parameter): name for name, parameter in named_parameters(model).items()}
        for raw, norm in model.named_modules():
            if not keeps_batch_statistics(norm):
                continue
            name, layer = canonical(raw), layer_of(layers, canonical(raw))
            if norm.affine:
                speak = [names[id(parameter)] for parameter in norm.parameters()]
            else:
                speak = [info.name for info in layer.parameters] if layer else []
            if chosen.intersection([name, *speak]):
                extend_module(norm, InstanceMixing, share=self.share)
        if self.padding == "leave_out" and names_padding(argument_names(model)) and model not in _mixing(model):
            extend_module(model, PaddedModel)


def _mixing(model: nn.Module) -> list[InstanceMixing]:
    """Return the norms of a model that mix."""
    return [module for module in model.modules() if isinstance(module, InstanceMixing)]


class PaddedModel(ExtendedModule):
    """A model that tells its norms which positions of each example are padding, as its arguments say."""

    kind = "instance_statistics"

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return a ``forward`` with the original's arguments."""

        @wraps(original.forward)
        def forward(self: PaddedModel, *args: Any, **kwargs: Any) -> Any:
            watch = PaddingWatch(self)
            watch.begin(args, kwargs)
            norms = _mixing(self)
            for norm in norms:
                vars(norm)["watch"] = watch
            try:
                return original.forward(self, *args, **kwargs)
            finally:
                for norm in norms:
                    del vars(norm)["watch"]
                watch.close()

        return {"forward": forward}

    def difference(self) -> str:
        """Return how a model with such norms differs from one whose norms do not mix."""
        return _mixing(self)[0].difference()

    def remedy(self) -> str:
        """Return the strategy that keeps the mixture."""
        return _mixing(self)[0].remedy()

    def plain(self) -> nn.Module:
        """Refuse: norms of torch alone do not see the arguments of the model."""
        raise SpecError(
            f"export: norms of {self.own_class.__name__} leave out the padding that its arguments name, and modules of "
            "torch alone do not see them. Say NormAdaptation(padding='count'), or save the state dict and load it with "
            "conservtl."
        )


class InstanceMixing(ExtendedModule):
    r"""A batch norm that normalises each example by a mixture of the statistics it keeps and the example's own.

    With the kept mean and variance :math:`\mu, \sigma^2` and the mixture's :math:`\bar\mu, \bar\sigma^2`, the input

    .. math:: x' = \mu + (x - \bar\mu) \sqrt{\frac{\sigma^2 + \epsilon}{\bar\sigma^2 + \epsilon}}

    is normalised by the norm's own class as x would be by the mixture, so that whatever else a subclass of a batch
    norm does (an activation, say) stays as it is. While the norm follows its batches, it does not mix.
    """

    kind = "instance_statistics"
    settings = ("share",)
    share: float
    """Share of the example's own statistics, in [0, 1]."""
    watch: PaddingWatch | None = None
    """Knows the padding during a forward pass of a model whose arguments may name it."""

    def forward(self, input: Tensor, *others: Any) -> Any:  # noqa: A002 - the name that batch norms give it
        """Normalise (N, C, ...); with one value a channel, (N, C), by the kept statistics alone."""
        if not self.training and input.ndim > 2:
            input = self._mixed(input)  # noqa: A001 - as above
        return super().forward(input, *others)

    def _mixed(self, x: Tensor) -> Tensor:
        norm: Any = self
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        positions, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        padding = None if self.watch is None else self.watch.padding
        mask = None if padding is None else padding.mask(x.shape, 1, "a norm of each example's own statistics")
        if mask is None:
            variance, mean = torch.var_mean(wide, positions, correction=0, keepdim=True)
        else:
            mask = mask.unsqueeze(1)
            count = mask.sum(positions, keepdim=True)
            mean = torch.where(mask, wide, 0.0).sum(positions, keepdim=True) / count
            variance = torch.where(mask, wide - mean, 0.0).square().sum(positions, keepdim=True) / count
        kept_mean, kept_variance = norm.running_mean.view(shape), norm.running_var.view(shape)
        mixed_mean = torch.lerp(kept_mean.expand_as(mean), mean, self.share)
        mixed_variance = torch.lerp(kept_variance.expand_as(variance), variance, self.share)
        factor = ((kept_variance + norm.eps) / (mixed_variance + norm.eps)).sqrt()
        return (wide - mixed_mean).mul(factor).add(kept_mean).to(x.dtype)

    def plain(self) -> nn.Module:
        """Return the mixture in front of the norm, as a module of torch alone."""
        share = self.share
        restore_module(self)
        return plain_module(_Mixing(self, share))

    def difference(self) -> str:
        """Return how a model with such norms differs from one whose norms do not mix."""
        return f"norms mix in {self.share:.0%} of each example's own statistics"

    def remedy(self) -> str:
        """Return the strategy that keeps the mixture."""
        prior = 1 / self.share - 1
        return f"Add NormAdaptation(train='all', statistics='instance', prior={prior:.0f})."


class _Mixing(nn.Module):
    """The mixture of ``InstanceMixing`` in front of a norm in eval mode, by operations that torch.fx can trace."""

    def __init__(self, norm: Any, share: float) -> None:
        super().__init__()
        self.norm, self.share = norm, share
        self.train(norm.training)

    def forward(self, x: Tensor) -> Any:
        norm = self.norm
        rows = x.to(norm.running_mean.dtype).reshape(x.shape[0], x.shape[1], -1)
        moments = torch.var_mean(rows, 2, correction=0, keepdim=True)
        share = (x.dim() > 2) * self.share  # one value a channel has no statistics
        kept_variance, kept_mean = norm.running_var.view(1, -1, 1), norm.running_mean.view(1, -1, 1)
        mixed_variance = kept_variance + share * (moments[0] - kept_variance)
        mixed_mean = kept_mean + share * (moments[1] - kept_mean)
        factor = ((kept_variance + norm.eps) / (mixed_variance + norm.eps)).sqrt()
        return norm(((rows - mixed_mean) * factor + kept_mean).reshape(x.shape).to(x.dtype))
