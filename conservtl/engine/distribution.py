"""The way in which many processes share a model: replicas (DDP), or shards (FSDP2) for the steps of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.compat import plain_again, tree_map
from conservtl.engine.joining import is_launched
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.kernels.dtensor import place_like, sharded, whole
from conservtl.layers import canonical, unwrap
from conservtl.layers.names import named_modules, own_parameters
from conservtl.plan.plan import Plan

__all__ = [
    "check_divisible",
    "load_whole",
    "plain_environment",
    "shard",
    "shards",
    "unshard",
    "whole_on_cpu",
    "with_placed_state",
]

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


def shard(adaptation: Adaptation, device: torch.device) -> None:
    """Shard the parameters of a model over all processes by rows, and its starting values with them.

    The blocks among the plan's layers are gathered one at a time; everything else (embeddings, head) is one more unit.
    A block that shares a parameter with the rest is left to that unit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = unwrap(adaptation.model)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(adaptation, model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else it would stay whole after an evaluation
    adaptation.bound.anchors.shard(model)


def _blocks(adaptation: Adaptation, model: nn.Module) -> Iterable[nn.Module]:
    """Return the modules with children among the layers that share no parameter with others."""
    named = named_modules(model)
    found = [named[name] for layer in adaptation.layers for name in layer.modules if name in named]
    blocks = [module for module in dict.fromkeys(found) if any(module.children()) and module is not model]
    for block in blocks:
        inside = set(block.modules())
        own = {id(parameter) for parameter in block.parameters()}
        outside = {id(one) for other in model.modules() if other not in inside for one in other.parameters(False)}
        plain = type(block).forward is not nn.Module.forward  # a list of modules is never called itself
        if own and plain and not own & outside:
            yield block


def unshard(adaptation: Adaptation) -> None:
    """Make the parameters of a model whole again in every process; all of them call it together.

    The model is as before ``shard`` but for its values. An optimizer of the sharded parameters has no use any more.
    """
    model, bound = unwrap(adaptation.model), adaptation.bound
    bound.anchors.gather(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in own_parameters(module).items():
            if sharded(parameter):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                module.register_parameter(key, made[id(parameter)])
    for module in model.modules():
        plain_again(module)
    bound.hook = None


def whole_on_cpu(state: Any, *, keep: bool) -> Any:
    """Return a state with whole tensors on the CPU, None for each unless ``keep``; all processes call it together."""

    def gathered(tensor: Any) -> Any:
        if not sharded(tensor):
            return tensor
        put_together = whole(tensor.detach())
        return put_together.cpu() if keep else None

    return tree_map(gathered, state)


def load_whole(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of a model by name, sharded or not."""
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(place_like(saved[name], tensor) if sharded(tensor) else saved[name])


def with_placed_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with tensors of its parameters' shapes sharded like these."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))

    def placed(number: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
        parameter = by_number[number]
        return {
            key: place_like(value, parameter, value.dtype)
            if isinstance(value, Tensor) and value.shape == parameter.shape and sharded(parameter)
            else value
            for key, value in entry.items()
        }

    return {**state, "state": {number: placed(number, entry) for number, entry in state["state"].items()}}
