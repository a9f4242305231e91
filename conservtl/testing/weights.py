"""State dicts as checkpoints hold them: wrapped, prefixed, partial, in half precision."""

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
    """A saved state dict and the values that a model must take from it.

    Args:
        saved: possibly wrapped, prefixed, in half precision, partial or with stray entries.
        plain: name of a parameter or buffer of the model -> its value, in the model's type.
    """

    saved: dict[str, Any]
    plain: dict[str, Tensor]


@st.composite
def state_dicts(draw: st.DrawFn, model: nn.Module, *, partial: bool = True) -> Weights:
    """Draw random weights for a model, saved in one of the usual ways.

    Args:
        draw: given by hypothesis.
        model: gives names and shapes; it is not changed.
        partial: whether entries may be missing.

    Example:
        >>> import conservtl as ctl, torch
        >>> from hypothesis import given, settings
        >>> from conservtl.testing import state_dicts
        >>> model = torch.nn.Linear(2, 1)
        >>> @settings(max_examples=5, deadline=None)
        ... @given(state_dicts(model, partial=False))
        ... def test_every_weight_is_copied(weights):
        ...     ctl.adapt(model, weights.saved)
        ...     assert torch.equal(model.weight, weights.plain["weight"])
        >>> test_every_weight_is_copied()
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
    """Return a state dict of random values in which tied entries are equal and variances positive."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    state = {}
    for key, tensor in unwrap(model).state_dict(keep_vars=True).items():
        name = canonical(key)
        if id(tensor) not in drawn:
            value = torch.randn(tensor.shape, generator=generator)
            value = value.square() + 0.1 if name.endswith("running_var") else value
            drawn[id(tensor)] = (
                value if tensor.is_floating_point() else torch.randint(9, tensor.shape, generator=generator)
            )
        state[name] = drawn[id(tensor)].to(tensor.dtype)
    return state
