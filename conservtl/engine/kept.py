"""A frozen input side computes the same for the same example every epoch: compute it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.engine.data import Held
from conservtl.layers import Layer, canonical, unwrap

__all__ = ["KeptOutputs", "keep_outputs"]

_LIMIT = 2 << 30  # bytes of kept outputs; beyond it a step computes them again
_CHUNK = 64

Run = Callable[[Any], Any]


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass at the boundary
    """The boundary's output is known; what lies behind it is not wanted."""


class KeptOutputs:
    """Stands in for the frozen input side while ``index`` says which examples a step is about.

    The boundary, the last frozen module to run, returns its kept outputs; those before it return
    placeholders of the right shape. With ``index`` None everything computes as usual.

    Args:
        boundary: the module whose outputs are kept.
        skipped: modules that run before it -> (shape behind the batch, type) of their outputs.
        outputs: (N, ...) the boundary's output for every example.
        light: whether placeholders have no storage at all; some code between modules cannot take that.
    """

    def __init__(
        self,
        boundary: nn.Module,
        skipped: dict[nn.Module, tuple[tuple[int, ...], torch.dtype]],
        outputs: Tensor,
        light: bool,
    ) -> None:
        self.outputs = outputs
        self.index: Tensor | None = None
        self._light = light
        self._replaced = [boundary, *skipped]
        self._replace(boundary, lambda: self.outputs[self.index])
        for module, (shape, dtype) in skipped.items():
            self._replace(module, partial(self._placeholder, shape, dtype))

    def _replace(self, module: nn.Module, stand_in: Callable[[], Tensor]) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self.index is None else stand_in()

        module.forward = forward

    def _placeholder(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.index is not None
        size = (len(self.index), *shape)
        if self._light:
            return torch.empty(size, dtype=dtype, device="meta")
        return torch.zeros((), dtype=dtype, device=self.outputs.device).expand(size)

    def remove(self) -> None:
        """Give every module its own forward back."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)


@torch.no_grad()
def keep_outputs(
    model: nn.Module, run: Run, layers: Sequence[Layer], frozen: frozenset[str], batches: Held
) -> KeptOutputs | None:
    """Compute the frozen input side once over all examples, if that changes nothing.

    It would where something random stands in it, where a module runs more than once or its output is
    not one tensor with an example a row, or where code between the modules cannot do without it; the
    outputs with and without are compared before anything is trusted.

    Args:
        model: in training mode, on its device.
        run: batch content -> model outputs, under the run's autocast.
        layers: the model's layers, input side first.
        frozen: parameters that the current phase does not train.
        batches: the training data, without augmentation.

    Returns:
        None where nothing can be kept.
    """
    modules = {canonical(name): module for name, module in unwrap(model).named_modules()}
    prefix, rest = _split(layers, frozen, modules)
    if not prefix:
        return None
    first = batches.take(torch.arange(min(_CHUNK, batches.length)))
    with _evaluating(model):
        calls, reference = _trace(run, first, [*prefix, *rest])
    order = [module for module, _ in calls]
    ahead = order[: next((i for i, module in enumerate(order) if module in rest), len(order))]
    ahead = [module for module in ahead if module in prefix]
    if not ahead or any(order.count(module) != 1 for module in ahead) or not isinstance(reference, Tensor):
        return None
    shapes = {m: _shape(out, len(reference)) for m, out in calls if m in ahead}
    if any(shape is None for shape in shapes.values()):
        return None
    boundary = ahead[-1]
    outputs = _features(run, boundary, batches)
    if outputs is None:
        return None
    skipped = {m: shape for m, shape in shapes.items() if m is not boundary and shape is not None}
    for light in (True, False):
        kept = KeptOutputs(boundary, skipped, outputs, light)
        if _agrees(kept, model, run, first, reference):
            return kept
        kept.remove()
    return None


def _split(
    layers: Sequence[Layer], frozen: frozenset[str], modules: dict[str, nn.Module]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules of the frozen input side, and of everything behind it."""
    prefix: list[nn.Module] = []
    rest: list[nn.Module] = []
    for layer in layers:
        held = not rest and all(info.name in frozen for info in layer.parameters)
        (prefix if held else rest).extend(modules[name] for name in layer.modules)
    return prefix, rest


def _trace(run: Run, content: Any, modules: Sequence[nn.Module]) -> tuple[list[tuple[nn.Module, Any]], Any]:
    """Which of these modules run, in order, with their outputs; and the model's output."""
    calls: list[tuple[nn.Module, Any]] = []
    hooks = [m.register_forward_hook(lambda module, _, out: calls.append((module, out))) for m in modules]
    try:
        return calls, run(content)
    finally:
        for hook in hooks:
            hook.remove()


def _shape(output: Any, size: int) -> tuple[tuple[int, ...], torch.dtype] | None:
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != size:
        return None
    return tuple(output.shape[1:]), output.dtype


def _features(run: Run, boundary: nn.Module, batches: Held) -> Tensor | None:
    """The boundary's outputs for all examples, or None where they are random or too large."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: Any, output: Tensor) -> None:
        caught.append(output)
        raise _Reached

    hook = boundary.register_forward_hook(catch)
    state = _generators(batches.device)
    try:
        for index in torch.split(torch.arange(batches.length), _CHUNK):
            try:
                run(batches.take(index))
            except _Reached:
                pass
            else:
                return None
            if caught[0].nbytes / len(caught[0]) * batches.length > _LIMIT:
                return None
        if any(not torch.equal(a, b) for a, b in zip(state, _generators(batches.device), strict=True)):
            return None
    finally:
        hook.remove()
    return torch.cat(caught)


def _generators(device: torch.device) -> list[Tensor]:
    """States of the random generators a forward pass could draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _agrees(kept: KeptOutputs, model: nn.Module, run: Run, content: Any, reference: Tensor) -> bool:
    """Whether the model says the same with the kept outputs as without."""
    kept.index = torch.arange(len(reference), device=kept.outputs.device)
    try:
        with _evaluating(model):
            found = run(content)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False  # code between the modules needs what the placeholders do not have
    finally:
        kept.index = None
    return found.device == reference.device and torch.allclose(found, reference, rtol=1e-3, atol=1e-5)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
