"""A linear head that is fed from layers inside a model and replaces the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.batches import map_tensors
from conservtl.compat import remove_forward_hooks
from conservtl.errors import SpecError
from conservtl.layers import Layer, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.first_use import calls
from conservtl.layers.names import named_modules
from conservtl.plan.plan import Plan
from conservtl.runtime.layer_features import Channels, channel_axis, pooled, tensor_of

__all__ = ["ProbeHead", "ProbeTap", "add_probe_head", "refuse_tied", "remove_probe_head", "remove_taps"]

_HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ProbeHead(nn.Linear):
    """A linear map of the outputs of some layers: their means over positions, concatenated.

    Args:
        head: the module to replace; kept, but not as a part of the model.
        sizes: layer -> number of its channels, by depth.
        own: number of features of the head's own input, which come last. 0: that input is not used.
    """

    def __init__(self, head: Any, sizes: dict[str, int], own: int) -> None:
        like = head.weight
        super().__init__(sum(sizes.values()) + own, len(like), device=like.device, dtype=like.dtype)
        self.layers = tuple(sizes)
        self.own = own > 0
        self.replaced = [head]  # in a list, so that it is no child
        self.caught: dict[str, Tensor] = {}
        self.ndim = 2
        """Number of dimensions of the last input of the head that was replaced."""
        self.train(head.training)

    def features(self, entered: Tensor) -> Tensor:
        """Return the features (N, D) of the current forward pass."""
        if lost := [layer for layer in self.layers if layer not in self.caught]:
            raise SpecError(
                f"the output of layer {lost[0]!r}, which the head is fed from, was not computed before it. Call the "
                "whole model, or name other layers."
            )
        parts = [self.caught[layer] for layer in self.layers]
        return torch.cat([*parts, *([pooled(entered, 1)] if self.own else [])], 1)

    def forward(self, entered: Tensor) -> Tensor:
        """Return scores (N, classes), with the number of dimensions that the replaced head gives."""
        features = self.features(entered)
        self.caught.clear()
        self.ndim = entered.ndim
        return F.linear(features, self.weight, self.bias).view(len(features), -1, *[1] * (entered.ndim - 2))


@dataclass(frozen=True)
class Seen:
    """Places in the last output of a layer that were read.

    Args:
        depth: of the tensor in nested tuples.
        axis: of the channels.
        ndim: number of dimensions.
    """

    depth: int
    axis: int
    ndim: int


def depth_of(output: Any) -> int:
    """Return how many tuples the tensor is the first entry of."""
    depth = 0
    while isinstance(output, (tuple, list)):
        output, depth = output[0], depth + 1
    return depth


class ProbeTap:
    """A forward hook that passes a layer's output to the probe head."""

    computes = True
    """The model needs this hook to run: it does not only observe."""

    def __init__(self, probe: ProbeHead, layer: str, channels: Channels) -> None:
        self.probe, self.layer, self.channels = probe, layer, channels
        self.seen: Seen | None = None

    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        """Pass the means over positions of the layer's output to the head."""
        tensor = tensor_of(output, self.layer)
        self.seen = Seen(depth_of(output), self.channels.axis(tensor), tensor.ndim)
        # A copy: the next module may overwrite it, as ReLU(inplace=True) does.
        self.probe.caught[self.layer] = pooled(tensor, self.seen.axis).clone()


def refuse_tied(plan: Plan, label: str) -> None:
    """Raise if another module holds the head's weight too: a new head would replace that module's weight."""
    if tied := plan.tied_head:
        names = " and ".join(map(repr, (tied[0], *plan[tied[0]].aliases)))
        raise SpecError(
            f"{label}: the head must have a weight of its own; here {names} are one tensor, so a new one would replace "
            "the embedding too. Untie them (tie_word_embeddings=False), or name another head: adapt(..., head=[...])."
        )


def add_probe_head(model: nn.Module, layers: Sequence[Layer], example: Any, globs: Sequence[str]) -> None:
    """Replace the head by one that is fed from the layers of ``globs``; the last layer means the head's input.

    Raises:
        SelectorError: a glob matches no layer.
        SpecError: there is no example, or the head cannot be replaced.
    """
    model = unwrap(model)
    if example is None:
        raise SpecError(
            f"FeatureExtraction: how many features the layers {sorted(globs)} give is seen by running the model. Pass "
            "adapt(..., example=a batch of inputs)."
        )
    plan = Plan.draw(layers, {}, {})
    name, last = plan.head_module, plan[plan.head[0]].layer
    chosen = {layer for names in plan.select_layers(globs).values() for layer in names}
    modules = named_modules(model)
    head = modules.get(name)
    if isinstance(head, ProbeHead):
        raise SpecError(
            "FeatureExtraction: the model's head is fed from chosen layers already. Retract that of an earlier "
            "adaptation first (FeatureExtraction(layers=...).retract(model)); there can be one."
        )
    refuse_tied(plan, "FeatureExtraction")
    if not name or not isinstance(head, _HEADS):
        raise SpecError(
            f"FeatureExtraction: with layers, the head must be a linear map or a convolution inside the model, to be "
            f"replaced; here it is {name or 'the whole model'!r}, a {type(head).__name__}. Leave layers out."
        )
    parts = {layer.name: layer.modules[-1] for layer in layers if layer.name in chosen - {last} and layer.modules}
    if bare := chosen - {last} - parts.keys():
        raise SpecError(f"FeatureExtraction: {min(bare)!r} is a parameter outside all modules, so it has no output.")
    outputs, entered = _outputs(model, example, parts, name)
    sizes = {layer: outputs[layer].shape[channel_axis(modules[parts[layer]], outputs[layer])] for layer in parts}
    probe = ProbeHead(head, sizes, entered.shape[1] if last in chosen else 0)
    for layer, module in parts.items():
        modules[module].register_forward_hook(ProbeTap(probe, layer, Channels(modules[module])))
    holder, _, key = name.rpartition(".")
    setattr(modules[holder], key, probe)


def remove_taps(model: nn.Module) -> None:
    """Remove the hooks that feed the head."""
    for module in unwrap(model).modules():
        remove_forward_hooks(module, lambda hook: isinstance(hook, ProbeTap))


def remove_probe_head(model: nn.Module) -> None:
    """Restore the head that was replaced."""
    remove_taps(model)
    for parent in list(unwrap(model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ProbeHead):
                setattr(parent, name, child.replaced[0].to(child.weight.device))


def _outputs(model: nn.Module, example: Any, parts: dict[str, str], head: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the outputs of layers and the input of the head, from a copy of the model in eval mode."""
    trial = deep_copy(model).eval()
    modules = named_modules(trial)
    outputs: dict[str, Tensor] = {}
    entered: list[Tensor] = []
    for layer, name in parts.items():
        modules[name].register_forward_hook(lambda _, __, y, layer=layer: outputs.update({layer: tensor_of(y, layer)}))
    modules[head].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    device = next(trial.parameters()).device
    error: Exception | None = None
    with torch.no_grad(), torch.random.fork_rng():
        for call in calls(map_tensors(example, lambda tensor: tensor.to(device))):
            try:
                call(trial)
                break
            except Exception as caught:  # noqa: BLE001 - a model may fail in any way; the next way to call it may work
                error = caught
        else:
            raise SpecError(f"example: the model cannot be called with it: {error}. Pass a batch of inputs.") from error
    missed = [layer for layer in parts if layer not in outputs or outputs[layer].ndim < 2]
    flat = isinstance(modules[head], nn.Linear)
    if missed or not entered or (flat and entered[0].ndim != 2):
        seen = f"layer {missed[0]!r} puts out none" if missed else "its head gets none"
        raise SpecError(
            f"FeatureExtraction: each layer must put out, and a linear head get, features with an example a row; on "
            f"the example {seen}. Name other layers, or leave layers out."
        )
    return outputs, entered[0]
