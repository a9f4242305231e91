"""LoRA on a model: the pairs of factors whose product changes a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError
from conservtl.integrations.peft.names import BASE_LAYER, LORA_LAYER, check_lora, check_model
from conservtl.kernels.low_rank import squared_change
from conservtl.layers import canonical, unwrap

__all__ = ["Pair", "change", "lora_pairs"]

_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the weights of the base as they are."""


@dataclass(frozen=True)
class Pair:
    """The factors of one LoRA module: they change its weight by scale × B A.

    Args:
        module: name of the module.
        a: name of the parameter A, whose first axis is the rank.
        b: name of the parameter B, whose second axis is the rank.
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        weight: name of the weight that is changed.
        size: number of its elements.
        bias: name of the bias of B (``lora_bias=True``), or None.
    """

    module: str
    a: str
    b: str
    scale: float
    weight: str
    size: int
    bias: str | None = None


def lora_pairs(model: nn.Module) -> tuple[Pair, ...]:
    """Return the pairs of the active adapter.

    Raises:
        SpecError: the adapter is no plain LoRA, so that its change is not scale × B A.
        MissingExtraError: this version of PEFT has other names.
    """
    bare: Any = unwrap(model)
    check_model(bare)
    for name, config in bare.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if start not in _STARTS and name in bare.active_adapters:
            raise SpecError(
                f"adapter {name!r}: the base must be the source, but init_lora_weights={start!r} moves a part of its "
                "weights into the adapter. Choose another initialisation, such as True."
            )
    pairs = tuple(pair for module, layer in _lora_layers(bare) for pair in _pairs(module, layer))
    if not pairs:
        kinds = ", ".join(type(config).__name__ for config in bare.peft_config.values())
        raise SpecError(
            f"the adapter ({kinds}) changes no weight by B A, as LoRA does. Use LoraConfig, or leave out L2SP and what "
            "acts after training."
        )
    return pairs


@torch.no_grad()
def change(a: Tensor, b: Tensor, scale: float) -> float:
    """Return the norm of scale × B A; the root of ``squared_change`` in double precision."""
    return float(squared_change(a.double(), b.double(), scale).clamp(min=0).sqrt())


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules of the model that hold an active adapter of PEFT, all of them LoRA."""
    for name, module in model.named_modules():
        if not isinstance(module, BASE_LAYER):
            continue
        if not isinstance(module, LORA_LAYER):
            raise SpecError(
                f"{canonical(name)!r} is a {type(module).__module__.split('.')[2]} {type(module).__name__}, and only "
                "LoRA changes a weight by B A. Use LoraConfig, or leave out L2SP and what acts after training."
            )
        check_lora(module)
        yield canonical(name), module


def _pairs(name: str, layer: Any) -> Iterator[Pair]:
    active = [one for one in layer.active_adapters if one in layer.scaling]
    if len(active) > 1:
        raise SpecError(
            f"{name!r} has {len(active)} active adapters ({', '.join(active)}), whose changes are no single B A. "
            "Activate one: model.set_adapter(name)."
        )
    for one in active:
        if (other := _other_formula(layer, one)) is not None:
            raise SpecError(
                f"{name!r}: its change is not B A, but that of {other}. Leave out L2SP and what acts after training, "
                "or make it a plain LoRA."
            )
        base = layer.get_base_layer()
        if one in layer.lora_A:
            a, b = f"{name}.lora_A.{one}.weight", f"{name}.lora_B.{one}.weight"
        else:
            a, b = f"{name}.lora_embedding_A.{one}", f"{name}.lora_embedding_B.{one}"
        bias = f"{name}.lora_B.{one}.bias" if layer.lora_bias.get(one) else None
        yield Pair(name, a, b, float(layer.scaling[one]), f"{name}.base_layer.weight", base.weight.numel(), bias)


def _other_formula(layer: Any, adapter: str) -> str | None:
    """Return why a LoRA module changes its weight by something else than B A; None: it does not."""
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__
    if type(layer).__name__ == "ParamWrapper":
        return "a parameter with an axis of experts"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "a convolution in groups"
    return None
