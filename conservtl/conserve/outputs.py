"""Conserving outputs: what the source model said of the same inputs, as soft targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.decision import Term, View
from conservtl.errors import SpecError
from conservtl.functions import logits_of

__all__ = ["OutputTerm", "cross_entropy_to_source", "kl_to_source"]


class OutputTerm(Term):
    """Cross-entropy or KL divergence to the source's outputs."""

    kind: Literal["outputs"] = "outputs"
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Factor on it, beside the squared temperature."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the logits of both."""
    divergence: Literal["cross_entropy", "kl"] = "kl"
    """They differ by the entropy of the source's outputs, which has no gradient."""

    heads: ClassVar[bool] = True

    def describe(self) -> str:
        """One line for the plan's table."""
        own = f"{self.task:g} × task + " if self.task < 1 else ""
        name = "KL divergence" if self.divergence == "kl" else "cross-entropy"
        return f"{own}{self.weight:g} × {name} to the source's outputs at temperature {self.temperature:g}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """The term."""
        logits, mask = _frames(adapted.outputs)
        theirs, _ = _frames(source.outputs if source is not None else None)
        if logits.shape != theirs.shape:
            raise SpecError(
                f"{self.by}: the adapted model gives outputs of shape {tuple(logits.shape)}, the source "
                f"{tuple(theirs.shape)}. They must be of the same classes, in the same order; declare a head for other "
                "labels: fresh=['head']."
            )
        function = kl_to_source if self.divergence == "kl" else cross_entropy_to_source
        return self.weight * function(logits, theirs, self.temperature, mask)


def cross_entropy_to_source(
    logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T² × cross-entropy of softmax(logits / T) against softmax(source / T), mean over examples, or frames in the mask.

    The factor T² keeps its gradient of the size of the task's own (Hinton et al. 2015, section 2).

    Args:
        logits: (N, classes) or (N, frames, classes) of the adapted model.
        source: of the source model, the same shape; no gradient reaches it.
        temperature: T.
        mask: (N, frames), true where there is something; None everywhere.
    """
    target = (source.detach().float() / temperature).softmax(-1)
    return temperature**2 * _mean(-(target * (logits.float() / temperature).log_softmax(-1)).sum(-1), mask)


def kl_to_source(logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² × KL(softmax(source / T) || softmax(logits / T)); arguments as ``cross_entropy_to_source``."""
    theirs = (source.detach().float() / temperature).log_softmax(-1)
    ours = (logits.float() / temperature).log_softmax(-1)
    return temperature**2 * _mean((theirs.exp() * (theirs - ours)).sum(-1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over what is in the mask; what is not may be anything, NaN included."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _frames(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Logits, and which frames are no padding where the model gives (logits, lengths), or ``lengths`` beside them."""
    if isinstance(outputs, (tuple, list)):
        logits, lengths = outputs[0], outputs[1] if len(outputs) > 1 else None
    else:
        logits = logits_of(outputs)
        lengths = outputs.get("lengths") if isinstance(outputs, Mapping) else getattr(outputs, "lengths", None)
    if not isinstance(logits, Tensor):
        raise SpecError(f"outputs must be logits, (logits, lengths) or have .logits; received {type(logits).__name__}.")
    if not isinstance(lengths, Tensor) or logits.ndim != 3:
        return logits, None
    frames = torch.arange(logits.shape[1], device=logits.device)
    return logits, frames < lengths.to(logits.device)[:, None]
