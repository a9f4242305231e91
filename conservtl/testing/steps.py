"""What the contract needs of a training step: gradients of any model, and what must stand still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.runtime.freezing import tracks_statistics

__all__ = ["backward", "held", "measured", "outputs_of"]


def held(adaptation: Adaptation) -> dict[str, Tensor]:
    """What must not move in this phase: frozen parameters, and statistics of norms whose parameters are."""
    frozen = adaptation.frozen
    found: dict[str, Tensor] = {n: p.detach() for n, p in named_parameters(adaptation.model).items() if n in frozen}
    for raw, norm in unwrap(adaptation.model).named_modules():
        own = {canonical(f"{raw}.{name}") for name, _ in norm.named_parameters(recurse=False)}
        if tracks_statistics(norm) and own and own <= frozen:
            found |= {canonical(f"{raw}.{name}"): buffer for name, buffer in norm.named_buffers()}
    return found


def measured(adaptation: Adaptation, example: Any) -> bool:
    """Measure what the plan asks for, on the example; whether there is nothing left to measure."""

    def forward(model: nn.Module, batch: Any) -> Any:
        return _call(model, batch[0])

    def loss(outputs: Any, _: Any) -> Tensor:
        return sum((tensor.square().mean() for tensor in _tensors(outputs)), torch.zeros(()))

    if example is not None:
        for one in adaptation.plan.measures:
            adaptation.measure([(example,)], on=one.data, forward=forward, loss=loss)
    return not adaptation.outstanding()


def backward(adaptation: Adaptation, example: Any, step: int) -> None:
    """Gradients of some loss with the plan's terms; random ones where there is no input to have a loss of."""
    model = adaptation.model
    if example is None and adaptation.plan.terms:
        return
    if example is None:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        return
    outputs = _call(model, example)
    loss = sum((tensor.square().mean() for tensor in _tensors(outputs)), torch.zeros(()))
    if loss.requires_grad:
        inputs = tuple(example) if isinstance(example, list) else example
        adaptation.loss(loss, outputs, inputs).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """What a model makes of an example; nothing where there is none."""
    return [] if example is None else list(_tensors(_call(model, example)))


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
        return
    for part in found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else ():
        yield from _tensors(part)
