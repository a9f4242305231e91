"""Learning from examples without labels: entropy of the outputs and minimum class confusion (SUTA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from conservtl.bounds import NonNegative, NonNegativeInt, Positive, Share
from conservtl.errors import SpecError
from conservtl.functions import check_blank, logits_of
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.term import CLASS_AXIS, Term, View

__all__ = ["EntropyMinimisation", "EntropyTerm", "class_confusion", "entropy_of"]


class EntropyMinimisation(Strategy):
    r"""Make the model's outputs sure and its classes distinct, without labels: alone or beside a labelled loss.

    .. math:: L + \lambda \left( a \, H + (1 - a) \, C \right)

    p is the softmax of the logits over T, H the mean entropy of the positions whose best class is not ``blank``,

    .. math:: H = - \frac{1}{|S|} \sum_{i \in S} \sum_c p_{ic} \log p_{ic}, \qquad S = \{i : \arg\max_c p_{ic} \ne
        \text{blank}\}

    and C the confusion of K classes over all n positions,

    .. math:: C = \frac{1}{K} \sum_c \sum_{c' \ne c} \frac{(p^\top p)_{cc'}}{\sum_k (p^\top p)_{ck}}

    H alone has a trivial minimum, one class everywhere; C has not, as long as classes differ. With positions, (N,
    frames, classes) or (N, classes, H, W), both are means over the examples of what each gives by itself. Without,
    (N, classes), the examples of the batch are the positions. Padding is left out, as ``adaptation.loss`` finds it.

    For a recognizer by CTC ``blank`` is 0: most frames are blank and sure already. Labelled examples of a batch count
    in the term too. In a spec, utterances without texts come by ``data.unlabelled`` with ``pseudo_labels: null``; the
    positions of a decoder are the tokens of the hypothesis that it reads and their end, and it has no blank. The
    paper trains the norms and the feature extractor only, at a rate of 2e-5 and for ten steps an utterance.

    Measured: docs/methods.md.

    Cost: none beyond the outputs. Not for several processes.

    Hurts: where the source model is wrong with confidence; for many steps at a large rate.

    Reference:
        Lin, Li and Lee 2022, "Listen, adapt, better WER: source-free single-utterance test-time adaptation for
        automatic speech recognition", Interspeech (SUTA). Jin, Wang, Long and Wang 2020, "Minimum class confusion for
        versatile domain adaptation", equations 2 and 4 to 6, without the weights of the examples.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 2)}, [ctl.EntropyMinimisation(entropy=1.0)])
        >>> x = torch.randn(3, 2)
        >>> outputs = model(x)
        >>> no_labels = 0 * outputs.sum()
        >>> round(adaptation.loss(no_labels, outputs, x).item(), 4)  # log 2: as unsure as can be
        0.6931
    """

    kind: Literal["entropy_minimisation"] = "entropy_minimisation"
    aliases: ClassVar[Aliases] = {"suta": {"blank": 0}}
    test_fields: ClassVar[TestFields] = (
        {"weight": Span(0, 2), "entropy": Span(0, 1), "temperature": Span(0.5, 4), "blank": None, "class_axis": None},
    )
    weight: NonNegative = 1.0
    """lambda: factor on both."""
    entropy: Share = 0.3
    """a: the entropy's share; the rest is that of the confusion."""
    temperature: Positive = 2.5
    """T: divides the logits."""
    blank: NonNegativeInt | None = None
    """Class whose positions have no part in the entropy, such as CTC's blank, 0. None: all have."""
    class_axis: int | None = None
    """Axis of the classes in the outputs. None: the second, and the last of (N, frames, classes)."""

    def apply(self, plan: Plan) -> Plan:
        """Add the term.

        Raises:
            SpecError: the model has several outputs.
        """
        if plan.outputs:
            raise SpecError(
                f"{self.label}: the model must have one output to be sure of, or name its scores 'logits' or 'out'; it "
                f"has several, of {list(plan.outputs)}. Return one of them."
            )
        return plan.with_term(EntropyTerm(by=self.label, **self.model_dump(exclude={"kind"})))


class EntropyTerm(Term):
    """Entropy of outputs and confusion of classes."""

    kind: Literal["entropy"] = "entropy"
    weight: NonNegative = 1.0
    """Factor on both."""
    entropy: Share = 0.3
    """Share of the entropy."""
    temperature: Positive = 2.5
    """Divides the logits."""
    blank: NonNegativeInt | None = None
    """Class whose positions have no part in the entropy."""
    class_axis: int | None = None
    """Axis of the classes; None: by the layout."""

    source: ClassVar[bool] = False
    mean_over_batch: ClassVar[bool] = False  # without positions, classes are confused over the examples of a batch
    unlabelled: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the plan's table."""
        of = "" if self.blank is None else f" without class {self.blank}"
        return (
            f"{self.weight:g} × ({self.entropy:g} × entropy{of} + {1 - self.entropy:g} × class confusion) at "
            f"temperature {self.temperature:g}"
        )

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Return the term."""
        check_blank(self.by, self.blank, adapted.outputs)
        logits = logits_of(adapted.outputs)
        axis = CLASS_AXIS.get(logits.ndim) if self.class_axis is None else self.class_axis % max(1, logits.ndim)
        if axis is None or axis == 0 or logits.shape[axis] < 2:
            raise SpecError(
                f"{self.by}: outputs must be logits of two classes or more, (N, classes), (N, frames, classes) or (N, "
                f"classes, ...); received shape {tuple(logits.shape)}. Say class_axis, or leave {self.by} out."
            )
        if self.blank is not None and self.blank >= logits.shape[axis]:
            raise SpecError(
                f"{self.by}: blank must be one of {logits.shape[axis]} classes, from 0; received {self.blank}. Correct "
                "it, or set it to None."
            )
        mask = adapted.counted(logits, axis)
        rows = logits.movedim(axis, -1).flatten(1, -2) if logits.ndim > 2 else logits.unsqueeze(0)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if mask is None else mask
        valid = valid.reshape(rows.shape[:2])
        spoken = valid if self.blank is None else valid & (rows.argmax(-1) != self.blank)
        rows = (rows if rows.dtype == torch.float64 else rows.float()) / self.temperature
        both = self.entropy * entropy_of(rows, spoken) + (1 - self.entropy) * class_confusion(rows, valid)
        return self.weight * both


def entropy_of(logits: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over examples of the mean entropy of their positions; 0 for an example without positions.

    Args:
        logits: (N, positions, classes).
        counted: (N, positions), whether a position counts.
    """
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (torch.where(counted, entropy, 0).sum(1) / counted.sum(1).clamp_min(1)).mean()


def class_confusion(logits: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over examples of how much probability each class shares with the others, (K - trace) / K.

    Arguments as for ``entropy_of``.

    >>> sure = 100 * torch.eye(2).unsqueeze(0)
    >>> class_confusion(sure, torch.ones(1, 2, dtype=torch.bool)).item()
    0.0
    """
    p = torch.where(counted.unsqueeze(-1), logits.softmax(-1), 0)
    total = p.sum(1)  # the row sums of p^T p: the probabilities of a position add up to 1
    own = p.square().sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    # A class without any probability is confused with none: it must neither add nor give a gradient of 0 / 0.
    return torch.where(total > 0, 1 - own, 0).mean()
