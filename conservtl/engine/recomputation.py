"""Activation checkpointing: blocks keep their inputs alone, and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.runtime.freezing import tracks_statistics

__all__ = ["Recomputation"]

_METHOD = "checkpointed_blocks"


class Recomputation:
    """Context of forward passes whose blocks are computed again in the backward pass.

    Outside it the model computes as it is: a copy of its parameters that a function puts into it for a forward pass
    would not be there in the backward pass. Blocks are those of transformers' and timm's own mechanisms, and what a
    method ``checkpointed_blocks`` of a module lists. A mechanism that is switched on already is left alone.

    Args:
        model: the model; as found again after ``close``.
        training: says whether blocks are computed again, and whether batch norms learn their statistics.

    Raises:
        SpecError: it has no such blocks, or they hold batch norms whose statistics would count a batch twice.
    """

    def __init__(self, model: nn.Module, training: Training) -> None:
        self._switches: list[Callable[[bool], None]] = []
        self._closing: list[Callable[[], None]] = []
        if not training.checkpointing:
            return
        blocks = list(self._found(model))
        if not blocks:
            raise SpecError(
                f"training.checkpointing computes blocks of a model again, and {type(model).__name__} names none: "
                f"models of transformers and timm do, and those with a method {_METHOD}() that returns their blocks. "
                "Leave it out."
            )
        inside = {module for block in blocks for module in block.modules()}
        names = [name for name, one in model.named_modules() if one in inside and tracks_statistics(one)]
        if names and training.batch_norm == "train":
            self.close()
            raise SpecError(
                f"training.checkpointing computes blocks twice, so that statistics of {names[0]!r} would count each "
                "batch twice. Set training.batch_norm to eval, or leave training.checkpointing out."
            )

    def __enter__(self) -> Self:
        for switch in self._switches:
            switch(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for switch in self._switches:
            switch(False)

    def close(self) -> None:
        """Leave the model as it was found."""
        while self._closing:
            self._closing.pop()()

    def _found(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the blocks in a module, and note how they are switched."""
        kind = type(module)
        if hasattr(kind, _METHOD):
            for block in getattr(module, _METHOD)():
                self._switches.append(_Block(block))
                yield block
        elif getattr(kind, "supports_gradient_checkpointing", False):
            yield from self._of_transformers(module)
        elif hasattr(kind, "set_grad_checkpointing"):
            if not getattr(module, "grad_checkpointing", False):
                self._switches.append(module.set_grad_checkpointing)  # type: ignore[arg-type]
            yield module
        else:
            for child in module.children():
                yield from self._found(child)

    def _of_transformers(self, model: Any) -> Iterator[nn.Module]:
        """Yield the parts of a model of transformers that have its flag."""
        flagged = [one for one in model.modules() if getattr(one, "gradient_checkpointing", None) is not None]
        if not any(one.gradient_checkpointing for one in flagged):
            newer = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing" if newer else "gradient_checkpointing"
            getattr(model, f"{name}_enable")({"use_reentrant": False})
            self._closing.append(getattr(model, f"{name}_disable"))
            switched = [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]
            self._switches += [partial(setattr, one, "gradient_checkpointing") for one in switched]
            for switch in self._switches:
                switch(False)
        yield from flagged


class _Block:
    """A block whose ``forward`` is replaced while switched on."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._own = vars(block).get("forward")  # of the instance, where somebody has set one

    def __call__(self, active: bool) -> None:
        if active:
            vars(self._block)["forward"] = partial(_checkpointed, self._block.forward)
        elif self._own is None:
            vars(self._block).pop("forward", None)
        else:
            vars(self._block)["forward"] = self._own


def _checkpointed(plain: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*inputs, **options)
    return checkpoint(plain, *inputs, use_reentrant=False, **options)
