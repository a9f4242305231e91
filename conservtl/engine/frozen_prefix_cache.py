"""Cache of a frozen input side: its outputs for each example are the same in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.batches import rows_on, tensors_of
from conservtl.compat import forget_graphs, forward_hooks, outside_graphs
from conservtl.engine.draws import Draws
from conservtl.engine.held import Held
from conservtl.engine.randomness import preserve_rng, torch_states
from conservtl.layers import Layer, unwrap
from conservtl.layers.names import named_modules
from conservtl.runtime.model_hooks import ForwardEnded, hooked
from conservtl.runtime.preserve import preserve_buffers

__all__ = ["FrozenPrefixCache", "cache_frozen_prefix"]

_LIMIT = 2 << 30  # largest cache in bytes; larger outputs are computed in each step
_CHUNK = 64  # examples per batch while the cache is filled
_ROUNDING = 1e-2  # tolerance, relative to the largest value: the rounding of bfloat16; real differences are larger

Run = Callable[[Any], Any]
Kind = tuple[tuple[int, ...], torch.dtype]


class FrozenPrefixCache:
    """Replaces the frozen input side by its cached outputs inside ``serving``.

    The boundary, the last frozen module to run, returns its cached outputs; the modules before it return placeholders
    of the right shape. Outside ``serving`` all modules compute.

    Args:
        boundary: the module whose outputs are cached.
        skipped: modules that run before it -> (shape without the batch axis, type) of their outputs.
        outputs: (N, ...), the boundary's output for each example.
        device: device of the batches.
        release: called when the outputs are no longer held.
        compiled: whether the model is compiled for training; these modules are then left out of its graphs.
    """

    def __init__(
        self,
        boundary: nn.Module,
        skipped: Mapping[nn.Module, Kind],
        outputs: Tensor,
        device: torch.device,
        release: Callable[[], None],
        *,
        compiled: bool = False,
    ) -> None:
        self.outputs, self._device, self._release = outputs, device, release
        self._compiled = compiled
        self.index: Tensor | None = None
        self.light = False  # whether placeholders have no storage; else they are NaN, which spreads to their uses
        self._originals = {module: module.__dict__.get("forward") for module in (boundary, *skipped)}
        self._replace(boundary, self._cached)
        for module, kind in skipped.items():
            self._replace(module, partial(self._placeholder, *kind))

    @contextmanager
    def serving(self, index: Tensor | None) -> Iterator[None]:
        """Serve the cached outputs of these examples to the forward passes inside."""
        self.index = index
        try:
            yield
        finally:
            self.index = None

    def remove(self) -> None:
        """Restore the forward method of every module."""
        self._release()
        for module, original in self._originals.items():
            del module.forward
            if original is not None:
                module.forward = original
        if self._compiled:
            forget_graphs()

    def _replace(self, module: nn.Module, replacement: Callable[[Tensor], Tensor]) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self.index is None else replacement(self.index)

        module.forward = outside_graphs(forward) if self._compiled else forward

    def _cached(self, index: Tensor) -> Tensor:
        return rows_on(self._device, self.outputs, index)

    def _placeholder(self, shape: tuple[int, ...], dtype: torch.dtype, index: Tensor) -> Tensor:
        device = torch.device("meta") if self.light else self._device
        # Not expanded: a module may write into it.
        return torch.full((len(index), *shape), torch.nan, dtype=dtype, device=device)


def cache_frozen_prefix(
    model: nn.Module,
    run: Run,
    layers: Sequence[Layer],
    frozen: frozenset[str],
    batches: Held,
    *,
    compiled: bool = False,
) -> FrozenPrefixCache | None:
    """Return a cache of the frozen input side over all examples, if caching changes no output.

    Caching is refused if the input side draws random numbers (of torch, NumPy, Python or the system), gives another
    result when it is run again, mixes the examples of a batch, has state or hooks, runs a module more than once or
    returns anything but one tensor with one row per example; or if a trained module takes an input from before the
    boundary. Nothing is inferred from names: the model is run on a few examples with and without the cache, in training
    mode, with placeholders that invalidate every output they reach.

    Args:
        model: in training mode, on its device. Its buffers and the random generators are restored.
        run: batch content -> model outputs, under the run's autocast.
        layers: the model's layers, input side first.
        frozen: parameters that the current phase does not train.
        batches: the training data, without augmentation.
        compiled: whether the model is compiled for training.
    """
    modules = named_modules(model)
    prefix, rest = _split(layers, frozen, modules)
    if not prefix or unwrap(model) is not model or any(_has_hooks(module) for module in prefix):
        return None
    probe = torch.arange(0, min(_CHUNK, batches.length), 2 if batches.length > 2 else 1)
    content = batches.take(probe)
    with preserve_rng(), preserve_buffers(model), Draws() as draws:
        start = torch_states(batches.device)
        calls, reference = _trace(run, content, [*prefix, *rest])
        ahead = _ahead(calls, prefix, rest, len(probe))
        if not ahead or not tensors_of(reference):
            return None
        boundary = next(reversed(ahead))
        kinds = {module: (tuple(output.shape[1:]), output.dtype) for module, output in ahead.items()}
        computed = ahead.pop(boundary)
        if not _same(_reach(run, boundary, content), computed):
            return None
        # Last: what a module remembers of these passes must not look like the probe's.
        outputs = _features(model, run, boundary, batches, draws)
        if outputs is None or not _alike([outputs[probe.to(outputs.device)]], [computed]):
            return None
        place = batches.holding.room(outputs.nbytes, batches.device)
        release = partial(batches.holding.release, outputs.nbytes, place)
        skipped = {module: kinds[module] for module in ahead}
        cache = FrozenPrefixCache(boundary, skipped, outputs.to(place), outputs.device, release, compiled=compiled)

        def agrees() -> bool:
            _set_generators(batches.device, start)
            try:
                with torch.no_grad(), cache.serving(probe):
                    return _alike(tensors_of(run(content)), tensors_of(reference))
            except Exception:  # noqa: BLE001 - code between the modules may do anything to a placeholder
                return False

        # NaN first, which invalidates every output it reaches: `real.add_(meta)` silently does nothing.
        if not agrees():
            cache.remove()
            return None
        cache.light = not compiled  # a graph between the modules would be compiled for tensors without storage
        cache.light = cache.light and agrees()
        if compiled:
            forget_graphs()  # graphs made before call the modules themselves
        return cache


def _split(
    layers: Sequence[Layer], frozen: frozenset[str], modules: Mapping[str, nn.Module]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules of the frozen input side, and the modules of all layers after it."""
    prefix: dict[nn.Module, None] = {}
    rest: dict[nn.Module, None] = {}
    for layer in layers:
        is_frozen = not rest and all(info.name in frozen for info in layer.parameters)
        (prefix if is_frozen else rest).update(dict.fromkeys(modules[name] for name in layer.modules))
    return [module for module in prefix if module not in rest], list(rest)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a forward hook would receive a placeholder."""
    return any(forward_hooks(inner) for inner in module.modules())


def _trace(run: Run, content: Any, modules: Sequence[nn.Module]) -> tuple[list[tuple[nn.Module, Any]], Any]:
    """Return the calls of these modules, in order, with their outputs; and the model's output."""
    calls: list[tuple[nn.Module, Any]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        # A copy: the next module may write into it, as ReLU(inplace=True) does.
        calls.append((module, output.clone() if isinstance(output, Tensor) else output))

    with hooked([module.register_forward_hook(record) for module in modules]):
        return calls, run(content)


def _ahead(
    calls: Sequence[tuple[nn.Module, Any]], prefix: Sequence[nn.Module], rest: Sequence[nn.Module], size: int
) -> dict[nn.Module, Tensor]:
    """Return the frozen modules that run before any other and once, with outputs of one row per example."""
    order = [module for module, _ in calls]

    def plain(call: tuple[nn.Module, Any]) -> bool:
        module, output = call
        return (
            module in prefix
            and module not in rest
            and order.count(module) == 1
            and isinstance(output, Tensor)
            and output.is_floating_point()
            and not output.requires_grad
            and output.ndim > 0
            and len(output) == size
        )

    return dict(takewhile(plain, calls))


def _features(model: nn.Module, run: Run, boundary: nn.Module, batches: Held, draws: Draws) -> Tensor | None:
    """Return the boundary's outputs for all examples; None if they are random, change a state or are too large."""
    states = [*torch_states(batches.device), *(buffer.clone() for buffer in model.buffers())]
    outputs: list[Tensor] = []
    with torch.no_grad(), draws.watching():
        for index in torch.split(torch.arange(batches.length), _CHUNK):
            reached = _reach(run, boundary, batches.take(index))
            if reached is None or reached.nbytes / len(index) * batches.length > _LIMIT:
                return None
            outputs.append(reached)
    current = [*torch_states(batches.device), *model.buffers()]
    if draws.found or any(not torch.equal(a, b) for a, b in zip(states, current, strict=True)):
        return None
    return torch.cat(outputs)


def _reach(run: Run, boundary: nn.Module, content: Any) -> Any:
    """Return the boundary's output for a batch; None if the pass ends without it."""
    outputs: list[Any] = []

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        raise ForwardEnded

    with boundary.register_forward_hook(catch):
        try:
            run(content)
        except ForwardEnded:
            return outputs[0]
    return None


def _same(actual: Any, expected: Tensor) -> bool:
    """Whether two outputs for the same batch are the same; on a GPU, a kernel may sum in another order."""
    if not isinstance(actual, Tensor):
        return False
    return torch.equal(actual, expected) if actual.device.type == "cpu" else _alike([actual], [expected])


def _alike(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are finite and equal, up to the rounding of another batch size or precision."""
    if [(a.shape, a.device) for a in actual] != [(b.shape, b.device) for b in expected]:
        return False
    for a, b in zip(actual, expected, strict=True):
        error = (a.detach().double() - b.detach().double()).abs()
        if error.numel() and not error.max() <= _ROUNDING * b.detach().double().abs().max():
            return False
    return True


def _set_generators(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
