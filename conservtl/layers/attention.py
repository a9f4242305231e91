"""Modules whose forward is called: those inside attention of torch are read instead."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from conservtl.layers.names import canonical

__all__ = ["outside_attention"]


def outside_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by canonical name, without those inside attention: torch never calls its projection's forward."""
    attentions = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    inside = {id(part) for attention in attentions for part in attention.modules()}
    return ((canonical(name), module) for name, module in model.named_modules() if id(module) not in inside)
