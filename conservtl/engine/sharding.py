"""Parameters sharded over processes (FSDP2) for the steps of a run, and whole again after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.compat import plain_again, tree_map
from conservtl.kernels.dtensor import place_like, sharded, whole
from conservtl.layers import unwrap
from conservtl.layers.names import named_modules, own_parameters

__all__ = ["load_whole", "shard", "unshard", "whole_on_cpu", "with_placed_state"]


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
