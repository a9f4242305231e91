"""Training steps for the contract: gradients of any model, tensors that must not move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.batches import map_tensors, tensors_of
from conservtl.labels import call_with
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.runtime.freezing import tracks_statistics

__all__ = ["backward", "doubled", "held", "measured", "objective", "outputs_of", "use_eval_modules"]


def held(adaptation: Adaptation) -> dict[str, Tensor]:
    """Return the tensors that must not move in this phase: frozen parameters, statistics of norms that are frozen."""
    frozen = adaptation.frozen
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in named_parameters(adaptation.model).items() if n in frozen}
    for raw, norm in unwrap(adaptation.model).named_modules():
        names = {canonical(f"{raw}.{name}") for name, _ in norm.named_parameters(recurse=False)}
        if tracks_statistics(norm) and names and names <= frozen:
            tensors |= {canonical(f"{raw}.{name}"): buffer for name, buffer in norm.named_buffers()}
    return tensors


def measured(adaptation: Adaptation, example: Any) -> bool:
    """Make the plan's measurements on the example; return whether none is outstanding."""

    def forward(model: nn.Module, batch: Any) -> Any:
        return call_with(model, batch[0])

    def loss(outputs: Any, _: Any) -> Tensor:
        return sum((tensor.square().mean() for tensor in _tensors(outputs)), torch.zeros(()))

    if example is not None:
        for one in adaptation.plan.measures:
            adaptation.measure([(example,)], on=one.data, forward=forward, loss=loss)
    return not adaptation.outstanding()


def objective(adaptation: Adaptation, example: Any, seed: int = 0, share: float | Tensor = 1.0) -> Tensor:
    """Return some loss of the model with the plan's terms; without an input, one linear in the parameters."""
    model = adaptation.model
    if example is None and adaptation.plan.terms:
        return torch.zeros(())
    if example is None:
        generator = torch.Generator().manual_seed(seed)
        trained = [one for one in model.parameters() if one.requires_grad]
        noise = [torch.randn(one.shape, generator=generator).to(one) for one in trained]
        return sum(((one * factor).sum() for one, factor in zip(trained, noise, strict=True)), torch.zeros(()))
    outputs = call_with(model, example)
    loss = sum((tensor.square().mean() for tensor in _tensors(outputs)), torch.zeros(()))
    if not loss.requires_grad:
        return loss
    return adaptation.loss(loss, outputs, example, share=share)


def backward(adaptation: Adaptation, example: Any, step: int) -> None:
    """Compute the gradients of ``objective``."""
    loss = objective(adaptation, example, step)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def use_eval_modules(model: nn.Module) -> None:
    """Put a model in train mode and its modules in eval mode, so that a step depends on no chance or statistics."""
    model.eval()
    unwrap(model).training = True


def doubled(model: nn.Module, example: Any) -> Any:
    """Return an example twice over; None unless the model takes it, and the first dimension is that of examples."""
    sizes = _lengths(tensors_of(example))
    if len(sizes) != 1 or 0 in sizes or sizes != _lengths(outputs_of(model, example)):
        return None
    twice = map_tensors(example, lambda tensor: torch.cat([tensor, tensor]))
    try:
        lengths = _lengths(outputs_of(model, twice))
    except RuntimeError:  # a model for batches of one size
        return None
    return twice if lengths == {2 * size for size in sizes} else None


def _lengths(tensors: list[Tensor]) -> set[int]:
    return {len(tensor) if tensor.ndim else 0 for tensor in tensors}


@torch.no_grad()
def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """Return the outputs of a model for an example; none without an example."""
    return [] if example is None else _tensors(call_with(model, example))


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of outputs that can have a gradient."""
    return [tensor for tensor in tensors_of(outputs) if tensor.is_floating_point()]
