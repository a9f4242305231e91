"""The way in which many processes share a model: replicas (DDP) or shards (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from conservtl.engine.joining import is_launched
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.layers import canonical
from conservtl.plan.plan import Plan

__all__ = ["check_divisible", "plain_environment", "shards"]

_FSDP = "ACCELERATE_USE_FSDP"
_LAYERDROP = ("layerdrop", "layer_drop", "encoder_layerdrop", "decoder_layerdrop")  # Hugging Face's, torchaudio's
_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def shards(training: Training, accelerator: Any, model: nn.Module) -> bool:
    """Return whether parameters are to be sharded over the processes.

    ``training.distributed`` of auto means what ``accelerate launch`` was configured for, or else replicas.
    """
    asked, kind = training.distributed, str(accelerator.distributed_type.value)
    if asked == "auto":
        sharded = kind.startswith("MULTI_") and accelerator.num_processes > 1 and _set(_FSDP)
        if sharded:
            _check_shardable(training, accelerator, model)
        return sharded
    if not is_launched():
        raise SpecError(
            f"training.distributed is {asked}, which takes processes that a launcher starts; there is this one. Start "
            "it with torchrun --nproc-per-node N -m conservtl run SPEC, or set it to auto."
        )
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise SpecError(f"training.distributed is {asked}, but the accelerator is of type {kind}. Set it to auto.")
    if asked == "fsdp2":
        _check_shardable(training, accelerator, model)
    return asked == "fsdp2"


def _check_shardable(training: Training, accelerator: Any, model: nn.Module) -> None:
    """Raise unless a model can be trained in shards: processes would wait for shards of layers that others left out."""
    if accelerator.scaler is not None:
        raise SpecError("training.precision is fp16, which fsdp2 does not support. Set it to bf16 or fp32, or use ddp.")
    if training.compile:
        raise SpecError("training.compile is set, which fsdp2 does not support. Leave it out, or use ddp.")
    for name, module in model.named_modules():
        for holder in (module, getattr(module, "config", None)):
            for field in _LAYERDROP:
                share = getattr(holder, field, None)
                if isinstance(share, (int, float)) and share > 0:
                    where = f"its module {canonical(name)!r}" if name else type(model).__name__
                    raise SpecError(
                        f"training.distributed is fsdp2, under which all processes must run the same layers; {where} "
                        f"leaves layers out at random ({field} is {share:g}). Set it to 0, or use ddp."
                    )


def check_divisible(plan: Plan) -> None:
    """Raise unless all terms of a plan may be computed on each process's part of a batch."""
    for term in plan.terms:
        if not type(term).mean_over_batch:
            raise SpecError(
                f"{term.by} acts on all examples of a batch together, and each process has only its part of them. "
                f"Train with one process, or leave {term.by} out."
            )


@contextmanager
def plain_environment() -> Iterator[None]:
    """Hide in the block what ``accelerate launch`` says about FSDP: an Accelerator would take it over."""
    if other := [name for variable, name in _OTHERS.items() if _set(variable)]:
        raise SpecError(
            f"accelerate launch is configured for {other[0]}, which fit does not support. Choose DDP (multi-GPU or "
            "multi-CPU) or FSDP in accelerate config."
        )
    hidden = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ[_FSDP] = hidden


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")
