"""L2-SP-Fisher, or elastic weight consolidation: hold most what the source's outputs hang on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.batches import row_count
from conservtl.bounds import Count, NonNegative
from conservtl.errors import SourceError, SpecError
from conservtl.functions import logits_of
from conservtl.methods._quadratic import Quadratic, decayed, penalised
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.decision import Measure, MeasureContext
from conservtl.plan.plan import Plan
from conservtl.runtime.per_example import PerExample

__all__ = ["FisherMeasure", "FisherPenalty", "FisherSP"]


_FEW = 32  # classes, up to which the true Fisher is exact by default
_DRAWS = 8  # classes drawn for each example beyond it


class FisherMeasure(Measure):
    """Mean over examples of the squared gradient of the log-likelihood, for each element of the parameters named."""

    kind: Literal["fisher"] = "fisher"
    names: tuple[str, ...]
    """Parameters."""
    fisher: Literal["empirical", "true"] = "empirical"
    """empirical: of the labels. true: of the model's own outputs, in expectation."""
    draws: Count | None = None
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

    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
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
            count += row_count(batch)
        return self._shaped({name: square / count for name, square in total.items()})

    def _labels(self, probe: MeasureContext, batch: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
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


class FisherPenalty(Quadratic):
    r"""A pull to the source weighed by F, :math:`\frac{1}{2} \sum_j \alpha_j F_j (w_j - w^0_j)^2`, alpha in rows."""

    kind: Literal["fisher_sp"] = "fisher_sp"
    column: ClassVar[Literal["pull", "decay"] | None] = "pull"

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"pull of {len(self.names)} parameters to the source, weighed by {', '.join(self.reads)}"


_ALPHA = {"coupled": 0.1, "decoupled": 3.0}


class FisherSP(Strategy):
    r"""Pull each weight toward the source as hard as the outputs depend on it.

    .. math:: \frac{\alpha}{2} \sum_{j \in S} F_j (w_j - w^0_j)^2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S what came from the source, N what is new, and F the diagonal of the Fisher information at the start,

    .. math:: F_j = \frac{1}{n} \sum_{i=1}^{n} \left(\frac{\partial \log p(y_i \mid x_i; w)}{\partial w_j}\right)^2

    example by example: the square of a batch's mean gradient is something else, and far smaller. ``empirical`` takes
    the data's labels y, ``true`` the expectation over the model's own outputs. On source data (``data="source"``) it
    says what the source needs: elastic weight consolidation; without source data, what the adaptation data show.

    Sums, not means, so that alpha does not depend on the number of parameters or on the batch size. With
    ``normalize="mean"`` F is 1 on average, so alpha stands beside that of ``L2SP``.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: on the target's data -0.1 ± 0.5, +0.3 ±
    0.3 and -0.3 ± 1.5; on the source's +0.2 ± 0.4, +0.4 ± 0.2 and +0.8 ± 1.1; with ``OutputConservation`` beside it
    +0.2 ± 0.5, +0.4 ± 0.3 and +0.6 ± 0.6 (benchmarks/results/methods.md).

    Cost: once before training, a gradient for each example (and class, where ``true``), of many examples at a time
    where ``torch.func`` can; then memory for F and one multiplication more than ``L2SP`` a step.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3 (L2-SP-Fisher). Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
        equation 3. Empirical and true: Kunstner, Hennig and Balles 2019.
    """

    kind: Literal["fisher_sp"] = "fisher_sp"
    aliases: ClassVar[Aliases] = {"ewc": {"data": "source"}}
    test_fields: ClassVar[TestFields] = (
        {"floor": Span(0.1, 1), "clip": [None, Span(1, 10)], "draws": [None, range(1, 4)]},
    )
    alpha: NonNegative | None = None
    """Strength on parameters from the source. None: 0.1 coupled, 3 decoupled."""
    beta: NonNegative = 0.01
    """Strength of plain L2 on fresh parameters."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """coupled: part of the gradient. decoupled: a step of its own before the gradient step, in which no element goes
    beyond the source."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm, embeddings and recurrent matrices included. all: biases
    and norms too."""
    fisher: Literal["empirical", "true"] = "empirical"
    """empirical: squared gradients of the loss at the labels. true: in expectation over the model's own outputs, which
    must be logits (N, classes)."""
    data: Literal["target", "source"] = "target"
    """target: measured on the adaptation data. source: on source data with the source model and its head, which must
    be given to ``fit`` or ``measure``."""
    draws: Count | None = None
    """true: how many classes are drawn from the outputs for each example, with a fixed seed. None: the expectation over
    all of them, exactly, or 8 draws where there are more than 32."""
    normalize: Literal["none", "mean"] = "mean"
    """mean: F is divided by its mean over all elements covered. none: as measured."""
    floor: NonNegative = 0.0
    """Least F of any element, in units of the mean with ``normalize="mean"``."""
    clip: NonNegative | None = None
    """Largest F of any element, in the same units. None: no limit."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.clip is not None and self.clip < self.floor:
            raise ValueError(f"clip must be at least floor; received clip={self.clip:g} and floor={self.floor:g}")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Choose pulls weighed by the Fisher for source rows, decays for fresh ones, and ask for the Fisher."""
        alpha = _ALPHA[self.mode] if self.alpha is None else self.alpha
        covered = plan.rows_on(self.on)
        held = [row.name for row in covered if row.origin == "source"]
        measure = FisherMeasure(
            by=self.label,
            data=self.data,
            names=tuple(held),
            fisher=self.fisher,
            draws=self.draws,
            normalize=self.normalize,
            floor=self.floor,
            clip=self.clip,
        )
        plan = plan.with_measure(measure) if held else plan
        plan = decayed(plan, self.label, {row.name: self.beta for row in covered if row.origin == "fresh"}, self.mode)
        penalty = FisherPenalty(by=self.label, names=(), mode=self.mode, reads=(measure.name,))
        return penalised(plan, penalty, dict.fromkeys(held, alpha))
