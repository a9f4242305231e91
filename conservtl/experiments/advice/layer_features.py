"""Features of every layer for some data, averaged over positions, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.data import Data
from conservtl.engine.batching import as_batches
from conservtl.errors import SelectorError
from conservtl.functions import Forward, labels_of, logits_of
from conservtl.functions import forward as plain_forward
from conservtl.layers import Layer, unwrap
from conservtl.layers.names import named_modules
from conservtl.runtime.freezing import tracks_statistics
from conservtl.runtime.layer_features import Channels, pooled
from conservtl.runtime.model_hooks import hooked
from conservtl.runtime.preserve import eval_mode

__all__ = ["LayerFeatures", "features_of", "statistics_shift"]


@dataclass(frozen=True)
class LayerFeatures:
    """Features and outputs of a model, on the CPU.

    Args:
        layers: layer -> (N, channels), the mean over positions; input side first, without layers whose output is no
            tensor with channels.
        outputs: (N, classes) logits.
        labels: (N,).
    """

    layers: dict[str, Tensor]
    outputs: Tensor
    labels: Tensor


@torch.no_grad()
def features_of(
    model: nn.Module,
    data: Data,
    layers: Sequence[Layer],
    *,
    batch_size: int = 256,
    forward: Forward = plain_forward,
    labels: Callable[[Any], Tensor | None] = labels_of,
) -> LayerFeatures:
    """Run a model over data once, in eval mode, and return its features; the model is left as found.

    Layers may be convolutions, recurrent layers or transformer blocks; the features of a layer are the outputs of its
    last module.

    Raises:
        SelectorError: the model has no such layer.
        DataError: there is no data.
    """
    place = next(model.parameters()).device
    taken: dict[str, list[Tensor]] = {layer.name: [] for layer in layers if layer.modules}
    outputs: list[Tensor] = []
    classes: list[Tensor] = []
    with eval_mode(model), _pooling(model, layers) as caught:
        for batch in as_batches(data, batch_size, place, shuffle=False).epoch():
            caught.clear()
            outputs.append(logits_of(forward(model, batch.content)).float().cpu())
            classes.append(torch.as_tensor(labels(batch.content)).cpu())
            for name, rows in caught.items():
                taken[name].append(rows)
    found = {name: torch.cat(parts) for name, parts in taken.items() if len(parts) == len(outputs)}
    return LayerFeatures(found, torch.cat(outputs), torch.cat(classes))


@torch.no_grad()
def statistics_shift(
    model: nn.Module, data: Data, *, batch_size: int = 256, forward: Forward = plain_forward
) -> float | None:
    r"""Return the shift between data and the statistics that a model's norms keep of the source.

    .. math:: \operatorname{mean}_c \frac{\sqrt{(\mu_c - \mu^0_c)^2 + (\sigma_c - \sigma^0_c)^2}}{\sigma^0_c}

    with mu0 and sigma0 a channel's running statistics and mu, sigma those of the norm's inputs on the data: the Fréchet
    distance of two normal distributions in units of the source's standard deviation; the mean over all norms.

    Args:
        model: the source model; left as found.
        data: examples of the target.
        batch_size: examples a forward pass.
        forward: as for ``fit``.

    Returns:
        0 for equal statistics; None if no norm keeps any.
    """
    norms: list[Any] = [module for module in unwrap(model).modules() if tracks_statistics(module)]
    moments = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def add(norm: nn.Module, inputs: Any) -> None:
        values = inputs[0].double().movedim(1, 0).flatten(1).cpu()
        moments[norm] += torch.stack(
            [torch.full_like(values[:, 0], values.shape[1]), values.sum(1), (values**2).sum(1)]
        )

    place = next(model.parameters()).device
    with hooked([norm.register_forward_pre_hook(add) for norm in norms]), eval_mode(model):
        for batch in as_batches(data, batch_size, place, shuffle=False).epoch():
            forward(model, batch.content)
    shifts = []
    for norm, (count, total, squares) in moments.items():
        if not count.any():
            continue
        mean, source = total / count, (norm.running_var.double().cpu() + norm.eps).sqrt()
        spread = (squares / count - mean**2).clamp_min(0).sqrt()
        away = ((mean - norm.running_mean.double().cpu()) ** 2 + (spread - source) ** 2).sqrt() / source
        shifts.append(float(away.mean()))
    return sum(shifts) / len(shifts) if shifts else None


@contextmanager
def _pooling(model: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that holds the pooled outputs of layers after each forward pass."""
    modules = named_modules(model)
    caught: dict[str, Tensor] = {}

    def keep(name: str, channels: Channels, _: nn.Module, __: Any, output: Any) -> None:
        output = _first_tensor(output)
        if isinstance(output, Tensor) and output.ndim >= 2:
            caught[name] = pooled(output.float(), channels.axis(output)).cpu()

    with ExitStack() as hooks:
        for layer in layers:
            if not layer.modules:
                continue
            if layer.modules[-1] not in modules:
                raise SelectorError(f"the model has no layer {layer.name!r}. Give the layers that find_layers gives.")
            module = modules[layer.modules[-1]]
            hooks.enter_context(module.register_forward_hook(partial(keep, layer.name, Channels(module))))
        yield caught


def _first_tensor(output: Any) -> Any:
    while isinstance(output, (tuple, list, Mapping)) and output:
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output
