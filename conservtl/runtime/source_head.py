"""The source's own head on the body of an adapted model, where the target's labels differ from the source's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.names import named_modules

__all__ = ["SourceHead"]


class SourceHead:
    """The head of a source model."""

    def __init__(self, source: nn.Module, name: str) -> None:
        self.name = name
        self.module = named_modules(source)[name]
        self._copies: dict[torch.device, nn.Module] = {}

    def outputs(self, entering: Tensor) -> Any:
        """Return the head's outputs for the features that enter it, with gradient to them.

        Features in half precision come from a pass under autocast, which may be over: then the head runs under it too.
        """
        own = next(self.module.parameters(), entering)
        mixed = entering.dtype in (torch.bfloat16, torch.float16) and own.dtype != entering.dtype
        with torch.autocast(entering.device.type, entering.dtype) if mixed else nullcontext():
            return self.module(entering)

    @contextmanager
    def replacing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the source's head into the place of a model's own for a while; yields the model, unwrapped.

        The whole module is replaced, not its weights alone: the model's own head may be fed from other layers.
        """
        bare = unwrap(model)
        parent, _, key = self.name.rpartition(".")
        holder = bare.get_submodule(parent)
        head = holder.get_submodule(key)
        setattr(holder, key, self._on(next(bare.parameters()).device))
        try:
            yield bare
        finally:
            setattr(holder, key, head)

    def _on(self, device: torch.device) -> nn.Module:
        if device not in self._copies:
            self._copies[device] = deep_copy(self.module).to(device)
        return self._copies[device]
