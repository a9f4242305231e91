"""The diagonal Fisher information: how much the source's outputs hang on each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.conserve.batches import size_of
from conservtl.conserve.per_example import PerExample
from conservtl.decision import Measure, Probe
from conservtl.errors import SourceError, SpecError
from conservtl.functions import logits_of

__all__ = ["FisherMeasure"]

_FEW = 32  # classes, up to which the true Fisher is exact by default
_DRAWS = 8  # classes drawn for each example beyond it
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FisherMeasure(Measure):
    """Mean over examples of the squared gradient of the log-likelihood, for each element of the parameters named."""

    kind: Literal["fisher"] = "fisher"
    names: tuple[str, ...]
    """Parameters."""
    fisher: Literal["empirical", "true"] = "empirical"
    """empirical: of the labels. true: of the model's own outputs, in expectation."""
    draws: Annotated[int, Field(ge=1)] | None = None
    """true: classes drawn for each example; None: all of them, or 8 drawn where there are more than 32."""
    normalize: Literal["none", "mean"] = "mean"
    """mean: divided by its mean over all elements."""
    floor: NonNegative = 0.0
    """Least value, after that."""
    clip: NonNegative | None = None
    """Largest value, after that."""

    def describe(self) -> str:
        """One line for the plan's table."""
        return (
            f"{self.fisher} Fisher information of {len(self.names)} parameters on {self.data} data, example by example"
        )

    def compute(self, probe: Probe) -> dict[str, Tensor]:
        """The Fisher, in the parameters' own precision whatever the run's: squares of small gradients need the range.

        Raises:
            SourceError: the source model has no parameter of a name.
            SpecError: the outputs are no logits where they must be, or the Fisher is zero or not finite.
        """
        if missing := [name for name in self.names if name not in probe.parameters]:
            raise SourceError(f"{self.by}: the source model has no parameter {missing[0]!r}. Set data='target'.")
        own = {name: probe.parameters[name] for name in self.names if probe.parameters[name].is_floating_point()}
        total = {name: torch.zeros_like(probe.parameters[name]) for name in self.names}
        count = 0

        def value(model: nn.Module, content: Any) -> Tensor:
            batch, labels = content
            outputs = probe.forward(model, batch)
            return probe.loss(outputs, batch) if labels is None else F.cross_entropy(logits_of(outputs), labels)

        examples = PerExample(probe.model, own, value)
        for batch in probe.batches:
            for labels, weights in self._labels(probe, batch):
                for name, square in examples.squares((batch, labels), weights).items():
                    total[name] += square
            count += size_of(batch)
        return self._shaped({name: square / count for name, square in total.items()})

    def _labels(self, probe: Probe, batch: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Labels of a batch with the weight of each; None: its own, each once."""
        if self.fisher == "empirical":
            yield None, None
            return
        with torch.no_grad():
            logits = logits_of(probe.forward(probe.model, batch))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise SpecError(
                f"{self.by}: fisher='true' takes its labels from logits (N, classes); the model gives {found}. Set "
                "fisher='empirical', which needs the loss only."
            )
        shares = logits.double().softmax(-1)
        classes = logits.shape[1]
        if self.draws is None and classes <= _FEW:
            for label in range(classes):
                yield torch.full((len(logits),), label, device=logits.device), shares[:, label]
            return
        draws = self.draws or _DRAWS
        generator = torch.Generator().manual_seed(0)
        for labels in torch.multinomial(shares.cpu(), draws, replacement=True, generator=generator).unbind(1):
            yield labels.to(logits.device), torch.full((len(logits),), 1 / draws)

    def _shaped(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = torch.stack([square.double().sum() for square in found.values()]).sum() / sum(
            square.numel() for square in found.values()
        )
        if not torch.isfinite(mean) or (self.normalize == "mean" and mean == 0):
            what = "zero everywhere" if mean == 0 else "not finite"
            raise SpecError(
                f"{self.by}: the Fisher information is {what} on this data. "
                "Measure it on data that the model is not certain of, with a loss that is finite."
            )
        scale = float(1 / mean) if self.normalize == "mean" else 1.0
        return {name: (square * scale).clamp(min=self.floor, max=self.clip) for name, square in found.items()}
