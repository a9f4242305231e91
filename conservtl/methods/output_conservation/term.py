"""The term of ``OutputConservation``: its form, its class axis and the positions that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from conservtl.bounds import NonNegative, NonNegativeInt, Positive
from conservtl.errors import SpecError
from conservtl.functions import check_blank, logits_of
from conservtl.methods.output_conservation.divergence import cross_entropy_to_source, kl_to_source, squared_to_source
from conservtl.plan.term import CLASS_AXIS, OutputForm, Term, View

__all__ = ["OutputConservationTerm"]

_SAY = "Say which: OutputConservation(form='softmax'), 'sigmoid' or 'squared'."


class OutputConservationTerm(Term):
    """Cross-entropy, KL divergence or squared distance to the source's outputs."""

    kind: Literal["outputs"] = "outputs"
    weight: NonNegative
    """Factor, beside the squared temperature."""
    temperature: Positive = 1.0
    """Divides the logits of both models."""
    divergence: Literal["cross_entropy", "kl"] = "kl"
    """The two differ by the entropy of the source's outputs, which has no gradient."""
    form: OutputForm | None = None
    """Form of the outputs; None: as the task's loss takes them."""
    class_axis: int | None = None
    """Axis of the classes; None: by the layout."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: padding is compared too."""
    blank: NonNegativeInt | None = None
    """Class at which the source's answers are left out; None: none is."""

    heads: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the plan's table."""
        task = f"{self.task:g} × task + " if self.task < 1 else ""
        if self.form == "squared":
            return f"{task}{self.weight:g} × squared distance to the source's outputs"
        name = "KL divergence" if self.divergence == "kl" else "cross-entropy"
        of = "" if self.form is None else f" of each {'label' if self.form == 'sigmoid' else 'class'}"
        blanks = "" if self.blank is None else f", without its answers {self.blank}"
        if self.form is None:
            how = f"{name} at temperature {self.temperature:g} or squared distance"
            return f"{task}{self.weight:g} × {how} to the source's outputs, as the task's loss takes them{blanks}"
        return f"{task}{self.weight:g} × {name}{of} to the source's outputs at temperature {self.temperature:g}{blanks}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Return the term; of several heads, or several calls of one, the sum."""
        theirs = source.outputs if source is not None else None
        if isinstance(adapted.outputs, list) and isinstance(theirs, list) and len(adapted.outputs) == len(theirs) > 1:
            pairs = zip(adapted.outputs, theirs, strict=True)
            return torch.stack([self._compared(replace(adapted, outputs=ours), other) for ours, other in pairs]).sum()
        return self._compared(adapted, theirs)

    def _compared(self, adapted: View, outputs: Any) -> Tensor:
        """Return the term for one output."""
        logits, target = logits_of(adapted.outputs), logits_of(outputs)
        if logits.shape != target.shape:
            raise SpecError(
                f"{self.by}: the adapted model gives outputs of shape {tuple(logits.shape)}, the source "
                f"{tuple(target.shape)}. They must be of the same classes, in the same order; declare a head for other "
                "labels: fresh=['head']."
            )
        if not logits.ndim:
            raise SpecError(
                f"{self.by}: the outputs must be scores of each example; received a scalar, as of a model that returns "
                "its loss. Let the model return the scores beside it, or use FeatureConservation."
            )
        form = self._form(adapted)
        axis = self._axis(adapted, logits, form)
        mask = adapted.counted(logits, axis, padding=self.padding == "leave_out")
        check_blank(self.by, self.blank, adapted.outputs)
        if self.blank is not None:
            spoken = self._spoken(target, form, axis)
            mask = spoken if mask is None else mask & spoken
        if form == "squared":
            return self.weight * squared_to_source(logits, target, mask, axis=axis)
        function = kl_to_source if self.divergence == "kl" else cross_entropy_to_source
        return self.weight * function(logits, target, self.temperature, mask, axis=axis, sigmoid=form == "sigmoid")

    def _spoken(self, target: Tensor, form: OutputForm, axis: int | None) -> Tensor:
        """Return the positions at which the source's answer is not the blank, the shape without the class axis."""
        if form != "softmax" or axis is None or target.ndim < 3:
            raise SpecError(
                f"{self.by}: blank is a class of logits with positions, (N, frames, classes), as of CTC; received form "
                f"{form!r} and outputs of shape {tuple(target.shape)}. Leave blank out."
            )
        if self.blank is None or self.blank >= target.shape[axis]:
            raise SpecError(
                f"{self.by}: blank must be one of {target.shape[axis]} classes; received {self.blank}. CTC's blank is "
                "usually output 0."
            )
        return target.argmax(axis) != self.blank

    def _form(self, adapted: View) -> OutputForm:
        """Return the form: as said, or as the task's loss takes the outputs; softmax for outputs without a loss."""
        if self.form is not None:
            return self.form
        if adapted.task is None:
            return "softmax"
        if adapted.task.form is None:
            raise SpecError(f"{self.by}: outputs must be compared as the loss takes them; {adapted.task.why}. {_SAY}")
        return adapted.task.form

    def _axis(self, adapted: View, logits: Tensor, form: OutputForm) -> int | None:
        """Return the class axis, at least 1; None if every element is an output of its own."""
        shape = tuple(logits.shape)
        if self.class_axis is not None:
            if not 1 - logits.ndim <= self.class_axis < logits.ndim or self.class_axis == 0:
                raise SpecError(
                    f"{self.by}: class_axis must be an axis of the outputs behind that of the examples; received "
                    f"{self.class_axis} for outputs of shape {shape}."
                )
            axis: int | None = self.class_axis % logits.ndim
        elif adapted.task is not None and adapted.task.axis is not None and adapted.task.axis < logits.ndim:
            axis = adapted.task.axis
        else:
            axis = CLASS_AXIS.get(logits.ndim)
        if form != "softmax":
            said = self.class_axis is not None or logits.ndim > 2
            return axis if said or not adapted.has_positions(logits.shape[-1]) else None
        if axis is None:
            raise SpecError(
                f"{self.by}: outputs must be (N, classes), (N, frames, classes) or (N, classes, ...) with two or three "
                f"further axes; received shape {shape}. Say class_axis, or form='sigmoid' or 'squared'."
            )
        if shape[axis] < 2:
            raise SpecError(
                f"{self.by}: form 'softmax' needs two classes or more, because the softmax of one logit is always 1; "
                f"received outputs of shape {shape} with the classes on axis {axis}. Say form='sigmoid' for one logit, "
                "form='squared' for a number, or class_axis."
            )
        return axis
