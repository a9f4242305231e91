"""Terms of a plan, added to the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.batches import tensors_of
from conservtl.compat import guard_hooks
from conservtl.errors import SpecError
from conservtl.functions import logits_of
from conservtl.labels import give_labels, takes_labels
from conservtl.layers.copying import deep_copy
from conservtl.padding import completed, padding_of_outputs
from conservtl.plan.plan import Plan
from conservtl.plan.term import TaskLoss, Term, View, all_of
from conservtl.runtime.source_model import CommonLabels, SourceModelRunner
from conservtl.runtime.taps import Taken, Taps
from conservtl.runtime.task_loss import on_other_inputs, read_task_loss
from conservtl.source.shared import SharedModel

__all__ = ["OtherPass", "TermRunner"]

OtherPass = tuple[Any, View | None, Any]
"""Outputs of a forward pass on other inputs, the source model's view of these, and the batch that they are from."""

_FORMS = {
    "softmax": "classes that exclude each other",
    "sigmoid": "labels of their own",
    "squared": "numbers, compared by squared distance",
}


class TermRunner:
    """Adds the terms of a plan to a loss.

    Args:
        plan: the plan.
        model: the model that is trained; hooks are registered on tapped modules.
        layers: layer -> name of the module whose output is the layer's.
        source_model: the source model, None if no term needs it.
        heads: names of the head's modules if the target has labels of its own.

    Raises:
        SpecError: a term taps a layer without an output.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        layers: Mapping[str, str],
        source_model: nn.Module | SharedModel | None,
        heads: Sequence[str],
    ) -> None:
        self.terms: tuple[Term, ...] = plan.terms
        self.needs_source = any(term.source for term in plan.terms)
        """Whether the source model must be run on each batch."""
        for term in self.terms:
            if bare := [layer for layer in term.taps if layer not in layers]:
                raise SpecError(
                    f"{term.by} taps {bare[0]!r}, which is a parameter outside all modules, so it has no output. Tap "
                    "another layer."
                )
        self._layers = {layer: layers[layer] for term in self.terms for layer in term.taps}
        self._heads = tuple(heads) if any(term.heads for term in self.terms) else ()
        self._labels = None if heads or plan.source_rows is None else CommonLabels(plan.source_rows)
        self.source_model = None if source_model is None else SourceModelRunner(source_model, self._layers, self._heads)
        self._taps: Taps | None = None
        self._placed: dict[str, tuple[Mapping[str, Tensor], torch.device, Mapping[str, Tensor]]] = {}
        self._by_loss = [term.by for term in plan.terms if term.heads and getattr(term, "form", "") is None]
        self.found: str | None = None
        """How the first loss took the outputs, for the plan's notes, which set it to None again."""
        self.added = 0  # losses since the last step that the terms were added to
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Register the taps on a model: the one of the constructor, or its copy."""
        enters = [name for term in self.terms for name in term.enters]
        enters = list(dict.fromkeys([*enters, *self._heads]))
        if self._layers or enters:
            self._taps = Taps(model, self._layers, enters)
            guard_hooks()

    def detach(self) -> None:
        """Remove the taps."""
        if self._taps is not None:
            self._taps.remove()

    def follow(self, model: nn.Module) -> None:
        """Tap the modules that replaced tapped ones in a model, wrapped or not."""
        if self._taps is not None and self._taps.replaced(model):
            self.detach()
            self.attach(model)

    def check_taps(self, model: nn.Module) -> None:
        """Raise if a tapped module was replaced: it would be taken for one that does not run."""
        if self._taps is not None and (replaced := self._taps.replaced(model)):
            raise SpecError(
                f"the module {replaced[0]!r}, whose features or inputs are compared, was replaced after "
                "adaptation.optimizer(...). Make the optimizer after the model is complete, wrapped and sharded."
            )

    def source_view(
        self, run: Callable[[nn.Module], Any], device: Any, batch: Any = None, outputs: Any = None
    ) -> View | None:
        """Return the source model's view of a batch; None if no term needs it.

        Arguments as for ``BoundPlan.source_view``; a dictionary as the batch may say what is padding.
        """
        if self.source_model is None or not self.needs_source:
            return None
        self.source_model.move(device)
        view = self.source_model.view(run)
        if self._lacks_labels(view, batch, outputs):
            give_labels(self.source_model.model)
            view = self.source_model.view(run)
        return replace(view, padding=completed(view.padding, batch))

    def _lacks_labels(self, view: View, batch: Any, outputs: Any) -> bool:
        """Return whether the source model gave outputs of another shape without labels that it can take."""
        if outputs is None or self._heads or self.source_model is None:
            return False
        if not isinstance(batch, Mapping) or "labels" not in batch or not takes_labels(self.source_model.model):
            return False
        try:
            last = None if self._labels is None else -1  # the number of labels may differ
            return logits_of(view.outputs).shape[:last] != logits_of(outputs).shape[:last]
        except SpecError:
            return False

    def objective(
        self,
        loss: Tensor,
        outputs: Any,
        source: View | None,
        measured: Mapping[str, Mapping[str, Tensor]],
        batch: Any = None,
        share: float | Tensor = 1.0,
        others: Callable[[], OtherPass] | None = None,
    ) -> Tensor:
        """Return the loss with all terms.

        Args:
            loss: the task's loss, a scalar.
            outputs: outputs of the adapted model in the forward pass just made.
            source: the source model's view of the same inputs; None if no term needs it.
            measured: measurements by name.
            batch: the batch; its labels say which positions do not count where the loss does not.
            share: factor on the terms: the batch's share of the step that the loss is a part of.
            others: makes a forward pass on other inputs, for the terms that compare with the source; None: they compare
                on the batch.
        """
        if not loss.requires_grad:
            return loss
        self.added += 1
        # Read before the source's head replaces the outputs: labels and padding belong to the task's outputs.
        compares = any(term.heads for term in self.terms)
        task = read_task_loss(loss, logits_of(outputs), batch) if compares else None
        if self._by_loss and task is not None and task.form is not None:
            self.found = f"{' and '.join(self._by_loss)}: the task's loss takes the outputs as {_FORMS[task.form]}"
            self._by_loss = []
        if others is None:
            view, known = self._views(outputs, source, task, (loss,))
            elsewhere = view
        else:
            of_batch = any(not term.source for term in self.terms)
            here = self._views(outputs, None, task, (loss,))[0] if of_batch else None
            outputs, source, batch = others()
            task = None if task is None else on_other_inputs(task, logits_of(outputs), batch)
            elsewhere, known = self._views(outputs, source, task)
            view = here or elsewhere
        total = loss
        for term in self.terms:
            total = total * term.task
        for term in self.terms:
            measurements = {name: self._on(loss.device, name, measured[name]) for name in term.reads}
            compared = (elsewhere, known) if term.source else (view, None)
            total = total + share * term.value(*compared, measurements)
        return total

    def _views(
        self, outputs: Any, source: View | None, task: TaskLoss | None, loss: Sequence[Tensor] = ()
    ) -> tuple[View, View | None]:
        """Return the adapted model's view of the pass just made, and the source's with the labels that both have.

        Args:
            outputs: of the adapted model.
            source: the source's view of the same inputs; None if no term needs it.
            task: how the task's loss takes the outputs; None if no term compares them.
            loss: the task's loss, if it was computed in the same pass.
        """
        passes = source.passes if source is not None else 1
        taken = self._taps.take(passes, loss, tensors_of(outputs)) if self._taps is not None else Taken()
        output_padding = padding_of_outputs(outputs)
        if self._heads and self.source_model is not None:
            entered = {name: all_of(taken.entering, name) for name in self._heads}
            if absent := [name for name, found in entered.items() if not found]:
                raise SpecError(f"the head {absent[0]!r} must run in each forward pass; it did not. Call the model.")
            self.source_model.move(entered[self._heads[0]][0].device)
            outputs = self.source_model.head(entered)
        padding = None if source is None else source.padding
        if self._labels is not None and task is not None and source is not None:
            adapted, known = self._labels.of(logits_of(outputs), logits_of(source.outputs), task.axis)
            outputs, source = adapted, replace(source, outputs=known)
        view = View(
            outputs,
            taken.features,
            taken.entering,
            task,
            padding,
            output_padding,
            axes=taken.axes,
            passes=passes,
            of_heads=bool(self._heads),
        )
        return view, source

    def check_added(self) -> None:
        """Raise if the gradients of a step lack the terms."""
        if self.terms and not self.added:
            raise SpecError(
                f"{self.terms[0].by} adds a term to the loss, but none was added since the last step. Call "
                "loss = adaptation.loss(loss, outputs, inputs) before backward()."
            )
        self.added = 0

    def _on(self, device: torch.device, name: str, measurement: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a measurement on the device, copied there once: a step must not wait for it."""
        placed = self._placed.get(name)
        if placed is None or placed[0] is not measurement or placed[1] != device:
            placed = measurement, device, {key: tensor.to(device) for key, tensor in measurement.items()}
            self._placed[name] = placed
        return placed[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> TermRunner:
        new = object.__new__(TermRunner)
        memo[id(self)] = new
        new.__dict__.update(self.__dict__, _taps=None, _placed={})  # copies share the source model, which never changes
        if self.source_model is not None and self.source_model.shared is not None:  # that is their own model
            new.source_model = deep_copy(self.source_model, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None, "_placed": {}}
