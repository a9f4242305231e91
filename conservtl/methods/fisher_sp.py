"""L2-SP-Fisher, or elastic weight consolidation: a pull weighed by how much the outputs depend on each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.batches import row_count
from conservtl.bounds import Count, NonNegative
from conservtl.errors import SourceError, SpecError, counted
from conservtl.functions import logits_of
from conservtl.layers import named_parameters
from conservtl.methods._pulls import Quadratic, with_decay, with_quadratic
from conservtl.methods._rows import Coverage, covered_rows, fresh_rows
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.decision import Measure, MeasureContext
from conservtl.plan.plan import Plan
from conservtl.runtime.per_example import PerExample

__all__ = ["FisherMeasure", "FisherPenalty", "FisherSP"]

_ALPHA = {"coupled": 0.1, "decoupled": 3.0}
_EXACT_CLASSES = 32  # number of classes up to which the true Fisher is exact by default
_DRAWS = 8  # classes drawn for each example if there are more


class FisherSP(Strategy):
    r"""Pull each weight toward the source in proportion to its Fisher information.

    .. math:: \frac{\alpha}{2} \sum_{j \in S} F_j (w_j - w^0_j)^2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S the parameters from the source, N the fresh ones, and F the diagonal of the Fisher information at the start,

    .. math:: F_j = \frac{1}{n} \sum_{i=1}^{n} \left(\frac{\partial \log p(y_i \mid x_i; w)}{\partial w_j}\right)^2

    example by example. (The square of a batch's mean gradient is another, far smaller number.) ``empirical`` takes the
    labels y from the data, ``true`` the expectation over the model's own outputs. Measured on source data
    (``data="source"``), F holds what matters to the source: elastic weight consolidation. Measured on the adaptation
    data, it needs no source data.

    Both parts are sums, not means, so that alpha depends on neither the number of parameters nor the batch size. With
    ``normalize="mean"``, F is 1 on average, so that alpha can be compared with that of ``L2SP``.

    Measured: docs/methods.md.

    Cost: once before training, a gradient for each example (and for each class if ``true``), of many examples at a time
    if ``torch.func`` can; then memory for F and one multiplication more than ``L2SP`` a step.

    Hurts: where the Fisher is measured on few examples, or on a source that answers all of them with certainty: it
    is then near 0 almost everywhere.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3 (L2-SP-Fisher). Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
        equation 3. Empirical and true: Kunstner, Hennig and Balles 2019, "Limitations of the empirical Fisher
        approximation for natural gradient descent".

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.eye(2)}, [ctl.FisherSP()])
        >>> batches = [(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))]
        >>> adaptation.measure(batches)
        >>> adaptation.measured["fisher"]["weight"].bool().tolist()  # the second input was always zero
        [[True, False], [True, False]]
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
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns, embeddings and recurrent matrices included. all:
    biases and norms too."""
    fisher: Literal["empirical", "true"] = "empirical"
    """empirical: squared gradients of the loss at the labels. true: in expectation over the model's own outputs, which
    must be logits (N, classes)."""
    data: Literal["target", "source"] = "target"
    """target: measured on the adaptation data. source: on source data, which ``fit`` or ``measure`` must get, with the
    source model and its head."""
    draws: Count | None = None
    """true: number of classes drawn from the outputs for each example, with a fixed seed. None: the exact expectation
    over all classes, or 8 draws if there are more than 32."""
    normalize: Literal["none", "mean"] = "mean"
    """mean: F is divided by its mean over all elements covered. none: F as measured."""
    floor: NonNegative = 0.0
    """Least F of any element, in units of the mean with ``normalize="mean"``."""
    clip: NonNegative | None = None
    """Largest F of any element, in the same units. None: no limit."""

    every: Count = 1
    """Steps from one pull to the next, which has the strength of all of them: a k-th of the time and traffic. Coupled,
    the gradient is added k times at once. Decoupled, each weight goes 1 - (1 - s)^k of the way, with s the share of one
    step. Plain L2 on fresh parameters acts in each step."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.clip is not None and self.clip < self.floor:
            raise ValueError(f"clip must be at least floor; received clip={self.clip:g} and floor={self.floor:g}")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the measurement of F, the pull that it weighs, and plain L2 on fresh parameters."""
        alpha = _ALPHA[self.mode] if self.alpha is None else self.alpha
        copied = tuple(row.name for row in covered_rows(plan, self.on) if row.origin == "source")
        fresh = [row.name for row in fresh_rows(plan, self.on)]
        measure = FisherMeasure(
            by=self.label,
            data=self.data,
            names=copied,
            fisher=self.fisher,
            draws=self.draws,
            normalize=self.normalize,
            floor=self.floor,
            clip=self.clip,
        )
        plan = plan.with_measure(measure) if copied else plan
        plan = with_decay(plan, self.label, dict.fromkeys(fresh, self.beta), self.mode)
        penalty = FisherPenalty(by=self.label, names=(), mode=self.mode, reads=(measure.name,), every=self.every)
        return with_quadratic(plan, penalty, dict.fromkeys(copied, alpha))


class FisherMeasure(Measure):
    """Mean over examples of the squared gradient of the log-likelihood, for each element of some parameters."""

    kind: Literal["fisher"] = "fisher"
    names: tuple[str, ...]
    """Parameters to measure."""
    fisher: Literal["empirical", "true"] = "empirical"
    """empirical: at the data's labels. true: in expectation over the model's own outputs."""
    draws: Count | None = None
    """true: number of classes drawn for each example. None: all classes, or 8 draws if there are more than 32."""
    normalize: Literal["none", "mean"] = "mean"
    """mean: F is divided by its mean over all elements. none: F as measured."""
    floor: NonNegative = 0.0
    """Least F, after that."""
    clip: NonNegative | None = None
    """Largest F, after that. None: no limit."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return (
            f"{self.fisher} Fisher information of {counted(len(self.names), 'parameter')} on {self.data} data, "
            "example by example"
        )

    def check(self, model: nn.Module) -> None:
        """Raise if a parameter is complex, whose squared gradient is not a Fisher information."""
        parameters = named_parameters(model)
        if complex_ones := [name for name in self.names if parameters[name].is_complex()]:
            raise SpecError(
                f"{self.by} measures real parameters; {complex_ones[0]!r} is {parameters[complex_ones[0]].dtype}. "
                "Use L2SP, which pulls complex parameters too."
            )

    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
        """Return F, in the parameters' precision whatever the run's: squares of small gradients need its range.

        Raises:
            SourceError: the source model lacks a parameter.
            SpecError: the outputs must be logits and are not, or F is zero everywhere or not finite.
        """
        if missing := [name for name in self.names if name not in probe.parameters]:
            raise SourceError(f"{self.by}: the source model has no parameter {missing[0]!r}. Set data='target'.")
        parameters = {name: probe.parameters[name] for name in self.names if probe.parameters[name].is_floating_point()}
        total = {name: torch.zeros_like(probe.parameters[name]) for name in self.names}
        count = 0

        def value(model: nn.Module, content: Any) -> Tensor:
            batch, labels = content
            outputs = probe.forward(model, batch)
            return probe.loss(outputs, batch) if labels is None else F.cross_entropy(logits_of(outputs), labels)

        examples = PerExample(probe.model, parameters, value)
        for batch in probe.batches:
            for labels, weights in self._labels(probe, batch):
                for name, square in examples.squares((batch, labels), weights).items():
                    total[name] += square
            count += row_count(batch)
        for name, rows in probe.left_out.items():
            if name in total and rows:
                total[name][list(rows)] = 0
        every = sum(square.numel() for square in total.values())
        left_out = sum(total[name][list(rows)].numel() for name, rows in probe.left_out.items() if name in total)
        return self._normalised({name: square / count for name, square in total.items()}, every - left_out)

    def _labels(self, probe: MeasureContext, batch: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield labels of a batch and their weights; (None, None): the data's labels, each with weight 1."""
        if self.fisher == "empirical":
            yield None, None
            return
        with torch.no_grad():
            logits = logits_of(probe.forward(probe.model, batch))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            received = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise SpecError(
                f"{self.by}: fisher='true' takes its labels from logits (N, classes); the model gives {received}. Set "
                "fisher='empirical', which needs the loss only."
            )
        shares = logits.double().softmax(-1)
        classes = logits.shape[1]
        if self.draws is None and classes <= _EXACT_CLASSES:
            for label in range(classes):
                yield torch.full((len(logits),), label, device=logits.device), shares[:, label]
            return
        draws = self.draws or _DRAWS
        generator = torch.Generator().manual_seed(0)
        for labels in torch.multinomial(shares.cpu(), draws, replacement=True, generator=generator).unbind(1):
            yield labels.to(logits.device), torch.full((len(logits),), 1 / draws)

    def _normalised(self, squares: Mapping[str, Tensor], elements: int) -> dict[str, Tensor]:
        """Return F divided by its mean over this number of elements if asked for, then floored and clipped."""
        total = torch.stack([square.double().sum() for square in squares.values()]).sum()
        mean = total / elements
        if not torch.isfinite(mean) or (self.normalize == "mean" and mean == 0):
            value = "zero everywhere" if mean == 0 else "not finite"
            raise SpecError(
                f"{self.by}: the Fisher information is {value} on this data. "
                "Measure it on data that the model is not certain of, with a loss that is finite."
            )
        scale = float(1 / mean) if self.normalize == "mean" else 1.0
        return {name: (square * scale).clamp(min=self.floor, max=self.clip) for name, square in squares.items()}


class FisherPenalty(Quadratic):
    r"""A pull to the source weighed by F, :math:`\frac{1}{2} \sum_j \alpha_j F_j (w_j - w^0_j)^2`, alpha in rows."""

    kind: Literal["fisher_sp"] = "fisher_sp"
    column: ClassVar[Literal["pull", "decay"] | None] = "pull"

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return (
            f"pull of {counted(len(self.names), 'parameter')} to the source, weighed by "
            f"{', '.join(self.reads)}{self._rhythm}"
        )
