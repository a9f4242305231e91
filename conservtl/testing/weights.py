"""State dicts as they are found in the wild."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from conservtl.layers import canonical, unwrap

__all__ = ["Weights", "random_weights", "state_dicts"]

_PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.")
_WRAPPERS = (None, "state_dict", "model", "model_state_dict")
_STRAY: dict[str, Any] = {"best_prec1": 91.78, "epoch": 3, "arch": "resnet20"}


@dataclass(frozen=True)
class Weights:
    """A state dict as it was saved, and what it means.

    Args:
        saved: wrapped, prefixed, in half precision, partial, with stray entries, or none of it.
        plain: name of a parameter or buffer of the model -> the value it must take, in its own type.
    """

    saved: dict[str, Any]
    plain: dict[str, Tensor]


@st.composite
def state_dicts(draw: st.DrawFn, model: nn.Module, *, partial: bool = True) -> Weights:
    """Weights for a model, other than those it holds.

    Args:
        draw: hypothesis' own.
        model: whose names and shapes they have; it is not changed.
        partial: whether entries may be missing.
    """
    plain = random_weights(model, draw(st.integers(0, 2**31 - 1)))
    half = draw(st.booleans())
    if half:
        plain = {name: t.half().to(t.dtype) if t.is_floating_point() else t for name, t in plain.items()}
    missing: set[str] = set()
    if partial and draw(st.booleans()):
        missing = draw(st.sets(st.sampled_from(sorted(plain)), max_size=len(plain) - 1))
        plain = {name: tensor for name, tensor in plain.items() if name not in missing}
    prefix, wrapper = draw(st.sampled_from(_PREFIXES)), draw(st.sampled_from(_WRAPPERS))
    saved: dict[str, Any] = {
        prefix + name: (t.half() if half and t.is_floating_point() else t.clone()) for name, t in plain.items()
    }
    stray = _STRAY if draw(st.booleans()) else {}
    return Weights({wrapper: saved, **stray} if wrapper else {**saved, **stray}, plain)


def random_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict of random values; tied entries are equal, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    found = {}
    for key, tensor in unwrap(model).state_dict(keep_vars=True).items():
        name = canonical(key)
        if id(tensor) not in drawn:
            value = torch.randn(tensor.shape, generator=generator)
            value = value.square() + 0.1 if name.endswith("running_var") else value
            drawn[id(tensor)] = (
                value if tensor.is_floating_point() else torch.randint(9, tensor.shape, generator=generator)
            )
        found[name] = drawn[id(tensor)].to(tensor.dtype)
    return found
