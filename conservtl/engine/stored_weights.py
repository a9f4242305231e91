"""How a run stores weights: their memory format, and the source's in half precision; as found afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conservtl.engine.training import Training
from conservtl.layers import canonical
from conservtl.layers.names import holder_counts
from conservtl.plan.plan import Plan
from conservtl.runtime.source_model import SourceModelRunner

__all__ = ["channels_last", "follow_layout", "source_in", "unused_half"]


@contextmanager
def channels_last(models: Iterable[nn.Module], *, active: bool = True) -> Iterator[None]:
    """Hold the weights of models in the layout (N, H, W, C) inside the block, if ``active``.

    Names, shapes and values stay; strides are restored at the end, because files and other programs expect them.
    """
    models = list(models) if active else []
    before = [{name: tensor.stride() for name, tensor in _images(model)} for model in models]
    try:
        for model in models:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
    finally:
        for model, strides in zip(models, before, strict=True):
            for name, tensor in _images(model):
                if name in strides and tensor.stride() != strides[name]:
                    tensor.data = _strided(tensor.detach(), strides[name])


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay out an optimizer's state as its parameters are: fused steps take both as flat memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = _strided(value, parameter.stride())


def _images(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.ndim == 4]


def _strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


_CASTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unused_half(training: Training, precision: str, runner: SourceModelRunner | None) -> str:
    """Return why ``source_precision: half`` changes nothing in a run; empty if it does, or is not set."""
    if training.source_precision != "half":
        return ""
    if precision not in _HALF:
        return f"source_precision half unused: the run computes in {precision}"
    if runner is None:
        return "source_precision half unused: no strategy runs the source model"
    return "source_precision half unused: the source shares the model's modules" if runner.shared is not None else ""


@contextmanager
def source_in(training: Training, precision: str, runner: SourceModelRunner | None, plan: Plan) -> Iterator[None]:
    """Hold the weights of the source model's linear maps and convolutions in half precision inside the block, if asked.

    Under autocast these modules round their weights to that precision in each pass, so no result changes. Norms,
    embeddings, tied weights, the head and classes of the user's own stay as they are, and so does a model that the
    source shares with the adapted one. The weights wait in the host's memory, and are put back at the end.
    """
    if training.source_precision != "half" or unused_half(training, precision, runner) or runner is None:
        yield
        return
    holders, heads = holder_counts(runner.model), plan.head_modules
    weights = [
        parameter
        for name, module in runner.model.named_modules()
        if type(module) in _CASTS and canonical(name) not in heads
        for parameter in module.parameters(recurse=False)
        if parameter.dtype == torch.float32 and holders[id(parameter)] == 1
    ]
    before = [weight.detach().cpu().clone(memory_format=torch.preserve_format) for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.detach().to(_HALF[precision])
        yield
    finally:
        for weight, original in zip(weights, before, strict=True):
            weight.data = original.to(weight.device)
