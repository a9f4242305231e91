"""Running statistics of norms, measured on the target: alone, or mixed with the source's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conservtl.batches import batch_size
from conservtl.bounds import NonNegativeInt
from conservtl.compat import InstanceNormBase
from conservtl.errors import DataError, SpecError, counted
from conservtl.layers import canonical, unwrap
from conservtl.plan.decision import Measure, MeasureContext
from conservtl.runtime.freezing import tracks_statistics
from conservtl.runtime.model_hooks import ForwardEnded, hooked
from conservtl.runtime.padding_watch import PaddingWatch

__all__ = ["NormStatisticsMeasure"]


class NormStatisticsMeasure(Measure):
    r"""Mean and variance of each norm's input over all of the data, mixed with those of the source.

    .. math:: \frac{N}{N + n} \text{source} + \frac{n}{N + n} \text{target}

    The norms are measured in the order of the forward pass, each behind norms that are adapted already, all in eval
    mode: so the inputs measured are those that the adapted model computes. The result does not depend on the size and
    order of the batches, as momentum's average over batches does.
    """

    kind: Literal["norm_statistics"] = "norm_statistics"
    prior: NonNegativeInt = 0
    """N: number of target examples that the source's statistics weigh as much as. 0: the target's alone."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: padding is measured too."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        share = f", mixed with the source's at the weight of {counted(self.prior, 'example')}" if self.prior else ""
        return f"statistics of the norms on the target{share}"

    def check(self, model: nn.Module) -> None:
        """Raise unless a norm of the model keeps statistics."""
        if not _norms(model):
            raise SpecError(
                f"{self.by}: no norm of {type(model).__name__} keeps running statistics that could be adapted (a layer "
                "norm normalises each example by itself). Use statistics='source', or another strategy."
            )

    @torch.no_grad()
    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
        """Return the adapted value of each buffer by its name.

        Raises:
            DataError: a norm sees one value a channel in all of the data, which has no variance.
        """
        found: dict[str, Tensor] = {}
        norms = _norms(unwrap(probe.model))
        for name, calls in _calls(probe, norms).items():
            norm = norms[name]
            moments, examples = self._measured(probe, norm, name, once=calls == 1)
            if moments.single:
                raise DataError(
                    f"{name!r} saw one value a channel in all of the data, which has no variance. Give more examples."
                )
            share = examples / (examples + self.prior)
            for kind, target in (("running_mean", moments.mean), ("running_var", moments.variance)):
                buffer = getattr(norm, kind)
                buffer.add_(share * (target - buffer))
                found[f"{name}.{kind}"] = buffer.clone()
        return found

    def _measured(self, probe: MeasureContext, norm: nn.Module, name: str, *, once: bool) -> tuple[_Moments, int]:
        """Return the moments of a norm's input over all of the data, without padding, and the number of examples.

        A norm that is called ``once`` in a forward pass ends it there.
        """
        moments = _Moments(isinstance(norm, InstanceNormBase))
        examples = 0
        watch = PaddingWatch(probe.model)
        current: list[Any] = [None]

        def listen(_: nn.Module, inputs: Any) -> None:
            said = watch.padding_of(current[0]) if self.padding == "leave_out" else None
            padding = None if said is None else said.of_layer(name)
            moments.take(inputs[0], None if padding is None else padding.mask(inputs[0].shape, 1, repr(name)))
            if once:
                raise ForwardEnded

        with norm.register_forward_pre_hook(listen), watch:
            for batch in probe.batches:
                current[0] = batch
                with suppress(ForwardEnded), probe.autocast():
                    probe.forward(probe.model, batch)
                examples += batch_size(batch)
        return moments, examples

    def use(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        """Write the statistics into the norms."""
        buffers = {canonical(name): buffer for name, buffer in model.named_buffers()}
        with torch.no_grad():
            for name, value in found.items():
                buffers[name].copy_(value)


def _norms(model: nn.Module) -> dict[str, Any]:
    return {canonical(name): module for name, module in model.named_modules() if tracks_statistics(module)}


def _calls(probe: MeasureContext, norms: Mapping[str, nn.Module]) -> Counter[str]:
    """Count the calls of each norm in a forward pass, in the order of first use; norms without calls are left out."""
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, __: calls.update([name])

    with hooked([norm.register_forward_pre_hook(counter(name)) for name, norm in norms.items()]), probe.autocast():
        probe.forward(probe.model, next(iter(probe.batches)))
    return calls


class _Moments:
    """Mean and variance of each channel in double precision, gathered over batches.

    Args:
        instances: whether to average the moments of each instance, as instance norms do, instead of pooling all values.
    """

    def __init__(self, instances: bool) -> None:
        self.instances = instances
        self.count = 0
        self.mean: Any = 0.0
        self._square: Any = 0.0

    def take(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of a norm's input, (N, channels, ...), where the mask, of the same shape without channels, is."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.instances and mask is not None:
            for row, positions in zip(x, mask, strict=True):
                values = row.flatten(1)[:, positions.flatten()]
                self._add(1, values.mean(1).double(), values.var(1).double())
            return
        if self.instances:  # torch keeps the average over instances
            values = x.flatten(2)
            self._add(len(x), values.mean(2).double().mean(0), len(x) * values.var(2).double().mean(0))
            return
        values = x.transpose(0, 1).flatten(1)
        values = values if mask is None else values[:, mask.flatten()]
        variance, mean = (moment.double() for moment in torch.var_mean(values, 1, correction=0))
        count = values.shape[1]
        # Chan et al. 1983: sums of squares about the common mean, without cancellation.
        between = (mean - self.mean).square() * (self.count * count / (self.count + count))
        self._add(count, mean, variance * count + between)

    def _add(self, count: int, mean: Tensor, square: Tensor) -> None:
        self.mean = self.mean + (mean - self.mean) * (count / (self.count + count))
        self._square = self._square + square
        self.count += count

    @property
    def single(self) -> bool:
        """Whether the variance is undefined: one value in all."""
        return self.count == 1 and not self.instances

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, as torch keeps it."""
        variance: Tensor = self._square / (self.count if self.instances else self.count - 1)
        return variance
