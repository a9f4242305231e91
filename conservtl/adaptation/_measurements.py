"""Measurements before training, and a plan drawn up again by what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from conservtl.adaptation._base import AdaptationBase
from conservtl.errors import PlanError, SpecError
from conservtl.functions import Forward, Loss, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.losses import as_loss
from conservtl.methods import apply_all
from conservtl.plan.decision import Measure, Search
from conservtl.runtime.measuring import check_importance, measure
from conservtl.source.by_label import rows_by_label
from conservtl.source.shared import SharedModel

__all__ = ["MeasurementMethods"]


class MeasurementMethods(AdaptationBase):
    """Methods of an adaptation that make what must be known before training."""

    def outstanding(self) -> tuple[Measure | Search, ...]:
        """Measurements and searches still to be made before an optimizer can be made."""
        return self.bound.outstanding()

    def measure(
        self,
        batches: Iterable[Any],
        *,
        on: Literal["target", "source"] = "target",
        forward: Forward = plain_forward,
        loss: Loss = cross_entropy,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Make the plan's measurements on this data, once, before training.

        With many processes, all call this together, on the same data, before the model is wrapped.

        Args:
            batches: a list, a DataLoader or another collection of (inputs, labels), or of batches that ``forward`` and
                ``loss`` take; iterated repeatedly.
            on: domain of the batches; measurements on the other domain are left out.
            forward: (model, batch) -> outputs.
            loss: (outputs, batch) -> scalar, the mean over the batch.
            autocast: returns the context of each forward pass.

        Raises:
            DataError: there are no batches, a single one, or an iterator.
            SpecError: the measurement is not possible on this model.
        """
        if on not in ("target", "source"):
            raise SpecError(f"on must be 'target' or 'source', the domain of the batches; received {on!r}.")
        if not callable(forward):
            raise SpecError(
                f"forward must be a function (model, batch) -> outputs; received {forward!r:.60}. Pass one."
            )
        self.bound.parameters()
        loss = as_loss(loss)
        for measurement in self.bound.unmeasured():
            if measurement.data == on:
                source = self.origin.source_model if on == "source" else None
                model = source if isinstance(source, nn.Module) else self.model
                rows = [row for row in self.plan.rows if row.source_rows is not None]
                left_out = {row.name: row.unused_rows if on == "source" else row.new_rows for row in rows}
                with source.as_source() if isinstance(source, SharedModel) else nullcontext():
                    tensors = measure(
                        measurement, model, batches, self.bound.modules(), forward, loss, autocast, left_out
                    )
                if on == "source":
                    by_label = {row.name: row.source_rows or () for row in rows if row.name in tensors}
                    tensors |= {name: rows_by_label(tensors[name], numbers) for name, numbers in by_label.items()}
                self.measured[measurement.name] = tensors
                measurement.use(unwrap(self.model), tensors)

    def use_measured(self, name: str, found: Mapping[str, Tensor]) -> None:
        """Use a measurement made before, such as a Fisher saved with a run, instead of measuring.

        Args:
            name: name of the measurement in the plan.
            found: name -> tensor, in the form of ``measured[name]``.

        Raises:
            SpecError: the plan has no such measurement, or the tensors do not fit the model.
        """
        measures = {one.name: one for one in self.plan.measures}
        if name not in measures:
            raise SpecError(f"use_measured: the plan measures {sorted(measures)}; received {name!r}. Use one of those.")
        copied = {key: tensor.detach().to("cpu", copy=True) for key, tensor in found.items()}
        measures[name].verify(copied)
        check_importance(self.plan, {name: copied})
        self.measured[name] = copied
        self.bound.anchors.forget()
        measures[name].use(unwrap(self.model), copied)

    def replan(self, **facts: str) -> None:
        """Draw up the plan again with new facts, before an optimizer is made.

        Args:
            facts: name -> value that strategies read in ``plan.facts``.

        Raises:
            PlanError: the new plan copies other layers than were copied.
        """
        drawn = self.origin.drawn.with_facts({**self.plan.facts, **facts}).with_notes(self.plan.notes)
        plan = apply_all(drawn, self.origin.strategies, self.origin.extensions).with_proxies(self.plan.proxies)
        if [row.origin for row in plan.rows] != [row.origin for row in self.plan.rows]:
            raise PlanError(f"the facts {facts} change which layers are copied, but they are copied already.")
        self.bound.bind_again(plan)
