"""Affine transform of a model's input: added, removed, and merged into the weights that take the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.batches import map_tensors, tensors_of
from conservtl.compat import register_first, remove_forward_pre_hooks
from conservtl.errors import SpecError
from conservtl.layers import Layer, canonical, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.first_use import calls
from conservtl.layers.names import holder_counts, named_modules, own_parameters
from conservtl.layers.plain import behind, plain_module
from conservtl.methods.input_transform.axis import feature_axis, feature_count

__all__ = ["NAME", "AffineTransform", "add_transform", "merge_transform", "plain_transform", "remove_transform"]

NAME = "input_transform"
"""Name of the module on the model."""

_CLOSE = 1e-3  # of the largest output; after a wrong merge outputs differ by far more
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AffineTransform(nn.Module):
    """x + D x + b over one axis of x. It begins as the identity, to which weight decay pulls it back."""

    complete = True  # a layer by itself: norms and tokens behind it do not join it

    def __init__(self, size: int, dim: int, bias: bool, like: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.into: str | None = None
        """Name of the module that the transform can be merged into."""
        self.weight = nn.Parameter(torch.zeros(size, size, device=like.device, dtype=like.dtype))
        zeros = torch.zeros(size, device=like.device, dtype=like.dtype)
        self.bias = nn.Parameter(zeros) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the transform of x, of the same shape."""
        return x + F.linear(x.movedim(self.dim, -1), self.weight, self.bias).movedim(-1, self.dim)


def add_transform(model: nn.Module, layers: Sequence[Layer], example: Any, dim: int | None, bias: bool) -> list[str]:
    """Add an identity at the model's input, and return the names of its parameters.

    ``dim`` None means the axis of the features, as the example tells.

    Raises:
        SpecError: the model has a transform already or no children, or the length of the axis is unknown.
    """
    model = unwrap(model)
    if hasattr(model, NAME):
        raise SpecError(
            "InputTransform: the model has an input transform already. Merge or retract that of an earlier adaptation "
            "first (InputTransform().merge(model), InputTransform().retract(model)); there can be one."
        )
    if not list(model.children()):
        raise SpecError(
            f"InputTransform: {type(model).__name__} is a single module, with nothing to put in front of. Wrap it: "
            "nn.Sequential(model)."
        )
    dim = feature_axis(example, dim)
    transform = AffineTransform(feature_count(model, layers, example, dim), dim, bias, next(model.parameters()))
    transform.train(model.training)
    register_first(model, NAME, transform)  # without an example, the order of layers is that of registration
    if not _runs_its_children(model):
        model.register_forward_pre_hook(_transformed, prepend=True, with_kwargs=True)
    transform.into = None if example is None else _consumer(model, example)
    return [f"{NAME}.{name}" for name, _ in transform.named_parameters()]


def remove_transform(model: nn.Module) -> None:
    """Remove the transform, whatever its values."""
    model = unwrap(model)
    if isinstance(getattr(model, NAME, None), AffineTransform):
        delattr(model, NAME)
        remove_forward_pre_hooks(model, lambda hook: hook is _transformed)


@torch.no_grad()
def merge_transform(model: nn.Module) -> bool:
    """Merge the transform into the weights that take the input if that is exact, and return whether none is left.

    W (x + D x + b) + c = (W + W D) x + (W b + c). A convolution that pads with zeros sees no b at the border. There,
    and if it has no bias c to add to, only a transform whose b is zero can be merged.
    """
    model = unwrap(model)
    transform = getattr(model, NAME, None)
    if not isinstance(transform, AffineTransform):
        return True
    modules = named_modules(model)
    module: Any = modules.get(transform.into or "")
    if transform.into is None or module is None or not _takes(model, module):
        return False
    if transform.bias is not None and bool(transform.bias.any()):
        if "bias" not in own_parameters(module) or _pads_with_zeros(module):
            return False
        weight: Any = module.weight
        module.bias.add_(weight.flatten(2).sum(2) @ transform.bias if weight.ndim > 2 else weight @ transform.bias)
    _absorb(module, transform.weight)
    remove_transform(model)
    return True


def plain_transform(model: nn.Module) -> nn.Module:
    """Return the model with its transform as a module of torch alone: its first child, or in front of it."""
    transform = getattr(model, NAME, None)
    if not isinstance(transform, AffineTransform):
        return model
    traced = plain_module(transform)
    if _runs_its_children(model):
        setattr(model, NAME, traced)
        return model
    remove_transform(model)
    return behind(traced, NAME, model)


def _absorb(module: Any, weight: Tensor) -> None:
    """Add W D to W."""
    module.weight.add_(torch.tensordot(module.weight, weight, dims=([1], [0])).movedim(-1, 1))


def _transformed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Transform the first tensor of a model's inputs: a pre-hook of the model."""
    transform: AffineTransform = getattr(model, NAME)
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], transform(value), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: transform(value)}
    raise SpecError("InputTransform: the model was called without a tensor, so there is no input to transform.")


def _runs_its_children(model: nn.Module) -> bool:
    """Whether the model calls all of its children in order, so that a first child needs no hook."""
    return type(model).forward is nn.Sequential.forward


def _consumer(model: nn.Module, example: Any) -> str | None:
    """Return the name of the one module that takes the transformed input, if a transform can be merged into it.

    Tested on a copy of the model: a random transform, merged into the first linear map or convolution that runs, must
    not change the outputs for random inputs.
    """
    trial = deep_copy(model).eval()
    transform: Any = getattr(trial, NAME)
    called: list[Any] = []
    for module in trial.modules():
        if _takes(trial, module):
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    names = {module: canonical(name) for name, module in trial.named_modules()}
    device = transform.weight.device
    with torch.no_grad(), torch.random.fork_rng():
        noise = map_tensors(
            example, lambda t: (torch.randn(t.shape) if t.is_floating_point() else t).to(device, t.dtype)
        )
        transform.weight.copy_(torch.randn(transform.weight.shape) / len(transform.weight) ** 0.5)
        for call in calls(noise):
            called.clear()
            expected = _outputs(call, trial)
            if expected is None:
                continue
            first = called[0] if called else None
            if first is None or first.weight.shape[1] != len(transform.weight):
                return None
            _absorb(first, transform.weight)
            transform.weight.zero_()
            return names[first] if _close(expected, _outputs(call, trial)) else None
    return None


def _outputs(call: Callable[[nn.Module], Any], model: nn.Module) -> list[Tensor] | None:
    """Return the outputs of a call, with the same random numbers each time; None if it fails."""
    torch.manual_seed(0)
    try:
        return tensors_of(call(model))
    except Exception:  # noqa: BLE001 - a model may fail in any way; the next attempt decides
        return None


def _close(a: list[Tensor], b: list[Tensor] | None) -> bool:
    """Whether outputs are equal to rounding, and finite."""
    if b is None or not a or len(a) != len(b):
        return False
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
    return all(bool((x - y).abs().max() <= _CLOSE * x.abs().max()) for x, y in pairs if x.numel())


def _takes(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module is a linear map or an ungrouped convolution with a weight that no other module shares."""
    plain = any(type(module).forward is kind.forward for kind in (nn.Linear, *_CONVOLUTIONS))
    if not plain or getattr(module, "groups", 1) != 1:
        return False
    weight = own_parameters(module).get("weight")
    return weight is not None and holder_counts(model)[id(weight)] == 1


def _pads_with_zeros(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    if module.padding == "same":
        return any(size > 1 for size in module.kernel_size)
    return module.padding != "valid" and any(module.padding)
