"""Position embeddings of vision transformers, resampled to another image size."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import counted
from conservtl.layers.names import named_modules

__all__ = ["resample_positions"]

_PREFIX_TOKENS = 2  # most class and distillation tokens before the grid of a model of unknown origin
_UP = 4  # modules above a position embedding among which its patch embedding is looked for
_NEAR = 2  # modules below those


@dataclass(frozen=True)
class _Resampled:
    """A position embedding for another grid.

    Args:
        value: in the model's shape.
        old: the source's grid.
        new: the model's grid.
        function: full name of the function that resampled it.
    """

    value: Tensor
    old: tuple[int, int]
    new: tuple[int, int]
    function: str


def resample_positions(
    model: nn.Module, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the position embeddings whose grid differs between source and model, resampled, and a note on each.

    A model of timm (absolute positions, and relative ones as biases) or torchvision is given that library's own
    function; other models that embed patches with a
    convolution are given bicubic interpolation, as DINO and Hugging Face's vision transformers use it. Class and
    distillation tokens stay as they are.
    """
    modules = named_modules(model)
    resampled, notes = {}, []
    for name, parameter in wanted.items():
        value = values.get(name)
        if value is None or value.shape == parameter.shape or "pos" not in name.lower():
            continue
        if (found := _resample(name, modules, value, tuple(parameter.shape))) is not None:
            resampled[name] = found.value.to(value.dtype)
            old, new = ("×".join(map(str, grid)) for grid in (found.old, found.new))
            notes.append(f"resampled {name} from {old} to {new} positions with {found.function}")
        elif (cut := _cut(name, modules, value, parameter)) is not None:
            resampled[name] = cut
            notes.append(
                f"took the first {len(cut)} of {counted(len(value), 'position')} of {name}, for shorter recordings"
            )
    return resampled, notes


@torch.no_grad()
def _resample(name: str, modules: Mapping[str, nn.Module], value: Tensor, shape: tuple[int, ...]) -> _Resampled | None:
    for above, rest in _ancestors(name):
        module = modules.get(above)
        if module is None:
            continue
        if rest == "pos_embed" and _of(module, "timm."):
            return _by_timm(module, value, shape)
        if rest == "relative_position_bias_table" and _of(module, "timm."):
            return _biases_by_timm(module, value, shape)
        if rest == "encoder.pos_embedding" and _of(module, "torchvision."):
            return _by_torchvision(module, value, shape)
    return (
        _by_torch(value, shape) if any(_embeds_patches(modules.get(above)) for above, _ in _ancestors(name)) else None
    )


def _cut(name: str, modules: Mapping[str, nn.Module], value: Tensor, parameter: Tensor) -> Tensor | None:
    """Return the first positions of Whisper's encoder: a table of sines, whose rows do not depend on its length."""
    above = name.removesuffix(".embed_positions.weight")
    encoder = modules.get(above) if above != name else None
    if encoder is None or not _of(encoder, "transformers.models.whisper.") or type(encoder).__name__[-7:] != "Encoder":
        return None
    fits = len(value) > len(parameter) and value.shape[1:] == parameter.shape[1:]
    return value[: len(parameter)] if fits else None


def _by_timm(module: Any, value: Tensor, shape: tuple[int, ...]) -> _Resampled | None:
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if grid is None or value.ndim != 3 or len(shape) != 3 or value.shape[-1] != shape[-1]:
        return None
    prefix = shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, value.shape[1] - prefix))
    if prefix < 0 or not side or side * side != value.shape[1] - prefix:
        return None
    from timm.layers import resample_abs_pos_embed

    new = resample_abs_pos_embed(value.float(), list(grid), [side, side], num_prefix_tokens=prefix)
    return _Resampled(new, (side, side), tuple(grid), "timm.layers.resample_abs_pos_embed")


def _biases_by_timm(module: Any, value: Tensor, shape: tuple[int, ...]) -> _Resampled | None:
    """Resample a table of biases, (2 H - 1) (2 W - 1) distances and extra rows for the class token, times heads."""
    window = getattr(module, "window_size", None)
    if window is None or value.ndim != 2 or value.shape[-1] != shape[-1]:
        return None
    new = (2 * window[0] - 1, 2 * window[1] - 1)
    side = math.isqrt(max(0, value.shape[0] - (shape[0] - new[0] * new[1])))
    if side * side != value.shape[0] - (shape[0] - new[0] * new[1]):
        return None
    from timm.layers import resize_rel_pos_bias_table

    table = resize_rel_pos_bias_table(value.float(), new_window_size=window, new_bias_shape=shape)
    return _Resampled(table, (side, side), new, "timm.layers.resize_rel_pos_bias_table")


def _by_torchvision(module: Any, value: Tensor, shape: tuple[int, ...]) -> _Resampled | None:
    side, new_side = (math.isqrt(max(0, count - 1)) for count in (value.shape[1], shape[1]))
    if (
        value.ndim != 3
        or value.shape[-1] != shape[-1]
        or (side * side, new_side * new_side)
        != (
            value.shape[1] - 1,
            shape[1] - 1,
        )
    ):
        return None
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = OrderedDict({"encoder.pos_embedding": value.float()})
    new = interpolate_embeddings(module.image_size, module.patch_size, state)["encoder.pos_embedding"]
    function = "torchvision.models.vision_transformer.interpolate_embeddings"
    return _Resampled(new, (side, side), (new_side, new_side), function)


def _by_torch(value: Tensor, shape: tuple[int, ...]) -> _Resampled | None:
    """Resample tokens (1, N, D) or (N, D), or a grid (1, H, W, D)."""
    if value.ndim != len(shape) or value.shape[-1] != shape[-1] or value.shape[:-2] != shape[:-2]:
        if value.ndim == len(shape) == 4 and (value.shape[0], value.shape[-1]) == (shape[0], shape[-1]):
            grid = _bicubic(value, (shape[1], shape[2]))
            return _Resampled(grid, (value.shape[1], value.shape[2]), (shape[1], shape[2]), _TORCH)
        return None
    for prefix in range(_PREFIX_TOKENS + 1):
        side, new_side = (math.isqrt(max(0, count - prefix)) for count in (value.shape[-2], shape[-2]))
        if min(side, new_side) < 2 or (side**2, new_side**2) != (value.shape[-2] - prefix, shape[-2] - prefix):
            continue
        tokens = value.reshape(1, *value.shape[-2:])
        grid = _bicubic(tokens[:, prefix:].reshape(1, side, side, -1), (new_side, new_side))
        new = torch.cat([tokens[:, :prefix].float(), grid.reshape(1, new_side**2, -1)], 1)
        return _Resampled(new.reshape(shape), (side, side), (new_side, new_side), _TORCH)
    return None


_TORCH = "torch.nn.functional.interpolate (bicubic)"


def _bicubic(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample (1, H, W, D)."""
    planes = grid.float().permute(0, 3, 1, 2)
    return nn.functional.interpolate(planes, size=size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def _ancestors(name: str) -> Iterator[tuple[str, str]]:
    """Yield the modules that contain a parameter, innermost first, each with the parameter's name in it."""
    parts = name.split(".")
    for place in range(len(parts) - 1, max(-1, len(parts) - 1 - _UP), -1):
        yield ".".join(parts[:place]), ".".join(parts[place:])


def _of(module: nn.Module, package: str) -> bool:
    return any(base.__module__.startswith(package) for base in type(module).__mro__)


def _embeds_patches(module: nn.Module | None) -> bool:
    """Return whether a module has a convolution whose patches do not overlap, near the top, and embeds no words."""
    if module is None:
        return False
    if any(isinstance(part, nn.Embedding) and "pos" not in name for name, part in module.named_children()):
        return False  # the positions of a text model beside a vision model
    near = (part for name, part in module.named_modules() if name.count(".") < _NEAR)
    convolutions = (part for part in near if isinstance(part, nn.Conv2d))
    return any(conv.kernel_size == conv.stride and conv.kernel_size[0] > 1 for conv in convolutions)
