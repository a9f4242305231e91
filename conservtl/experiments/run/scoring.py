"""What a model knows: accuracy on both domains, class by class, and agreement with the source model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.data import Data
from conservtl.engine.batching import as_batches
from conservtl.layers import unwrap

__all__ = ["SourceView", "agreement", "outputs_of", "per_class", "scores"]

_CPU = torch.device("cpu")


class SourceView:
    """The adapted body under the source's own head, which was kept aside.

    Where the labels changed, this measures what the adapted body still knows of the source.

    Args:
        source: the source model; not changed.
        head: names of its classifier's parameters.
    """

    def __init__(self, source: nn.Module, head: Sequence[str]) -> None:
        self.source = source
        self.head = head

    def __call__(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Source logits of the adapted body, (N, source classes)."""
        name = self.head[0].rpartition(".")[0]
        parent, _, key = name.rpartition(".")
        holder = unwrap(model).get_submodule(parent)
        own = holder.get_submodule(key)
        # The module and not its weights alone: the adapted model's may be fed from other layers.
        setattr(holder, key, copy.deepcopy(self.source.get_submodule(name)).to(inputs.device))
        try:
            logits: Tensor = unwrap(model)(inputs)
        finally:
            setattr(holder, key, own)
        return logits


@torch.no_grad()
def outputs_of(call: Callable[[Tensor], Tensor], data: Data, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of a whole set, on the CPU."""
    logits, labels = [], []
    for batch in as_batches(data, 256, device, shuffle=False).epoch():
        inputs, truth = batch.content
        logits.append(call(inputs).float().cpu())
        labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and mean cross-entropy."""
    return {
        "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }


def agreement(logits: Tensor, source: Tensor) -> dict[str, float]:
    """How far a model still says what the source model says.

    Args:
        logits: (N, classes) of the adapted model.
        source: (N, classes) of the source model, on the same examples.

    Returns:
        ``agreement``: share of examples with the same largest logit; ``kl``: mean KL(source || adapted) in
        nats.
    """
    kl = F.kl_div(logits.log_softmax(-1), source.log_softmax(-1), reduction="batchmean", log_target=True)
    return {"agreement": float((logits.argmax(-1) == source.argmax(-1)).float().mean()), "kl": max(0.0, float(kl))}


def per_class(before: Tensor, after: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each class before and after.

    Args:
        before: (N, classes) logits.
        after: (N, classes) logits.
        labels: (N,) positions in ``names``.
        names: the classes.
    """
    out: dict[str, Any] = {"labels": list(names), "before": [], "after": [], "counts": []}
    for label in range(len(names)):
        own = labels == label
        count = int(own.sum())
        out["counts"].append(count)
        for key, logits in (("before", before), ("after", after)):
            right = int((logits[own].argmax(-1) == label).sum())
            out[key].append(right / count if count else None)
    return out
