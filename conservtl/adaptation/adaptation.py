"""The adaptation: a model with its plan, as a user trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from conservtl.adaptation import _export, _finishing, _state
from conservtl.adaptation.bound_plan import BoundPlan, Origin
from conservtl.errors import SpecError
from conservtl.functions import Forward, Loss, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import Layer, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.losses import as_loss
from conservtl.plan.measure import Measure
from conservtl.plan.plan import Plan
from conservtl.plan.search import Search
from conservtl.plan.term import View
from conservtl.runtime.measuring import check_importance, measure
from conservtl.runtime.penalty_runner import total_penalty
from conservtl.source.by_label import rows_by_label
from conservtl.source.shared import SharedModel
from conservtl.source.transfer import TransferReport

__all__ = ["Adaptation"]


class Adaptation:
    """A model with its plan: makes the optimizer, the loss, the measurements and the finished weights.

    Args:
        model: the model, already at its starting point.
        plan: the decisions.
        transfer: what was copied.
        layers: the model's layers.
        origin: what the plan was drawn up from.

    A deep copy or a reloaded pickle has its own model, anchors and phase, and needs a new optimizer: torch drops the
    hooks of a copied one.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, transfer: TransferReport, layers: tuple[Layer, ...], origin: Origin
    ) -> None:
        self.transfer = transfer
        self.bound = BoundPlan(model, plan, layers, origin)

    @property
    def model(self) -> nn.Module:
        """The model, changed in place."""
        return self.bound.model

    @property
    def plan(self) -> Plan:
        """The decisions in force."""
        return self.bound.plan

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers, input side first."""
        return self.bound.layers

    @property
    def origin(self) -> Origin:
        """What the plan was drawn up from."""
        return self.bound.origin

    @property
    def training(self) -> Any:
        """Training settings handed to ``adapt`` in a recipe; None without."""
        return self.origin.training

    @property
    def phase(self) -> int:
        """Position of the current phase in ``plan.phases``."""
        return self.bound.phase

    @property
    def frozen(self) -> frozenset[str]:
        """Parameters that the current phase does not train."""
        return self.bound.frozen

    @property
    def measured(self) -> dict[str, dict[str, Tensor]]:
        """Measurements made so far: name -> their tensors on the CPU."""
        return self.bound.measured

    @property
    def start(self) -> dict[str, Tensor]:
        """Starting point of everything copied from the source, on the CPU: parameters and buffers by name.

        If parameters are sharded, all processes read it together.
        """
        copied = set(self.transfer.copied)
        anchors = self.bound.anchors
        buffers = {name: buffer for name, buffer in anchors.buffers.items() if name in copied}
        self.bound.parameters()
        return {**buffers, **anchors.start(self.model, self.plan)}

    def optimizer(
        self, cls: Callable[..., torch.optim.Optimizer] | None = None, *, pull: bool = True, **options: Any
    ) -> torch.optim.Optimizer:
        """Return an optimizer with the plan's rates in its groups and the pull in its step.

        The pull acts before the step, after clipping; call ``pull()`` before you clip to clip it with the task's
        gradients, as a term in the loss would be. Call this after the model has been moved, wrapped or sharded.

        Args:
            cls: any optimizer class that takes groups and dense gradients. None: that of the training settings handed
                to ``adapt`` in a recipe, with its rate.
            pull: whether the step adds the penalties' gradients; False for a loss that contains ``penalty()``.
            options: passed to ``cls``; ``lr`` is the rate that the plan's ratios multiply.

        Raises:
            SpecError: the optimizer cannot carry out the plan, or a measurement or search must be made first.

        Example:
            >>> import torch, conservtl as ctl
            >>> source, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
            >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
            >>> optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3)
        """
        return self.bound.make_optimizer(cls, options, pull=pull)

    def scheduler(self, cls: Callable[..., Any] | None = None, *args: Any, **options: Any) -> LRScheduler:
        """Return a scheduler of the last optimizer's rates that keeps their ratios, over phases too.

        A scheduler with bounds of its own (OneCycleLR's ``max_lr``, CosineAnnealingLR's ``eta_min``) acts on the
        optimizer's own rate, the ``lr`` of ``optimizer(...)``; each group's rate is the plan's ratio of that, times
        the scale of the current phase. Call its ``step`` as you would the scheduler's own.

        Args:
            cls: a scheduler class of torch, or a function that takes an optimizer and returns a scheduler. None: the
                schedule of the training settings handed to ``adapt`` in a recipe, over ``steps=...`` optimizer steps.
            args: positional arguments for ``cls`` after the optimizer.
            options: keyword arguments for ``cls``; one value for all groups.

        Raises:
            SpecError: no optimizer has been made yet, or ``cls`` is no class or function.

        Example:
            >>> import torch, conservtl as ctl
            >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(2))) for _ in range(2))
            >>> adaptation = ctl.adapt(model, source, [ctl.DiscriminativeLR(decay=0.1)])
            >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
            >>> scheduler = adaptation.scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
            >>> optimizer.step()
            >>> scheduler.step()
            >>> [round(rate, 3) for rate in scheduler.get_last_lr()]
            [0.05, 0.5]
        """
        return self.bound.make_scheduler(cls, args, options)

    def loss(
        self,
        loss: Tensor,
        outputs: Any,
        inputs: Any = None,
        *,
        source: View | None = None,
        batch: Any = None,
        share: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the loss to call ``backward`` on: the task's loss with the plan's terms on outputs and features.

        Without such terms it is ``loss`` itself.

        Args:
            loss: the task's loss, a scalar, the mean over the batch unless ``share`` says otherwise.
            outputs: the model's outputs in the forward pass just made.
            inputs: the model's inputs in that pass: a tensor, a tuple of positional or a dictionary of keyword
                arguments; ``labels`` among these reach a source model that needs them, and no other
                (``conservtl.labels``). The source model is run on them in eval mode, under the autocast that is active
                here.
            source: instead of ``inputs``, the result of ``source_view(inputs)`` from an earlier epoch.
            batch: the batch that the loss was computed on. Outputs at labels of -100 do not count; the loss itself
                says where they are if it is torch's cross-entropy. None: ``inputs``, if a dictionary with ``labels``.
            share: factor on the terms, for a ``loss`` that is not the batch's mean but its part of a step's: the sum
                over the batch divided by the number of labels in all accumulated batches, say. Then the batch's number
                of labels divided by that; these shares add up to 1.

        Padding does not count either. It is found among the model's arguments, or in a dictionary ``batch``, by name:
        ``lengths`` (or ``input_lengths``, ``wav_lens``, ...; integers or shares), ``attention_mask``, ``padding_mask``;
        or in outputs (logits, lengths).

        Returns:
            A scalar.

        Raises:
            SpecError: the loss is no scalar, a term needs the source's view and neither ``inputs`` nor ``source`` is
                given, or the model made no forward pass.
        """
        if loss.ndim:
            raise SpecError(
                f"the loss must be a scalar, the mean over the batch; received shape {tuple(loss.shape)}. Reduce it."
            )
        terms = self.bound.terms
        if not terms.terms:
            return loss
        if source is None and terms.needs_source:
            if inputs is None:
                by = next(term.by for term in terms.terms if term.source)
                raise SpecError(
                    f"{by} compares with the source model on the same inputs: pass loss(loss, outputs, inputs)."
                )
            source = self.bound.source_view(inputs, outputs=outputs)
        return terms.objective(loss, outputs, source, self.measured, inputs if batch is None else batch, share)

    def source_view(self, inputs: Any, forward: Forward | None = None) -> View | None:
        """Return the source model's outputs and tapped features for a batch; None unless a term needs them.

        Args:
            inputs: as the model takes them, or a batch that ``forward`` takes.
            forward: (model, batch) -> outputs; None calls the model with ``inputs``.
        """
        return self.bound.source_view(inputs, forward)

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
        self.bound.replan(**facts)

    def finish(
        self,
        batches: Iterable[Any] | None = None,
        *,
        forward: Forward = plain_forward,
        score: Callable[[], float] | None = None,
        valid: Iterable[Any] | None = None,
        objective: Callable[[nn.Module, Any], Tensor] = _finishing.mean_cross_entropy,
        margin: float = 0.0,
    ) -> dict[str, Any]:
        """Carry out the plan's ``after`` decisions at the end of training; ``fit`` does this by itself.

        Each is carried out once: a second call, or one after ``fit``, returns the facts of the first, unless steps
        were made since. If it is left out, a model that is saved, exported or deleted after training warns.

        Args:
            batches: batches of the training data, to recompute statistics on; iterated repeatedly.
            forward: (model, batch) -> outputs.
            score: () -> score of the model's current weights on a validation part; higher is better.
            valid: batches of the validation part; iterated repeatedly.
            objective: (model, batch of ``valid``) -> loss, a scalar.
            margin: largest difference of two scores that counts as chance, such as that of half an example.

        Returns:
            Name of each decision -> its facts for a report.

        Raises:
            SpecError: a decision needs a validation part, or batches, and there are none.
        """
        start = self.start if self.plan.after else {}
        return _finishing.finish(self.bound, start, batches, forward, score, valid, objective, margin)

    def merged(self) -> nn.Module:
        """Return a copy of the model in which added parameters are merged into the weights, if that is exact.

        Additions that cannot be merged stay. Without additions it is a plain copy.
        """
        return _finishing.merged(self.bound)

    def export(self) -> nn.Module:
        """Return a plain copy of the model in eval mode, which needs torch and your own code only.

        Added parameters are merged as by ``merged``; what cannot be merged (amplitudes of recurrent layers, a transform
        of the input, statistics of each example) becomes a ``torch.fx.GraphModule`` in its place. An adapter of PEFT is
        merged and unloaded. Hooks, held norms and what else belongs to training is gone; parameters that the plan
        froze ask for gradients again. The copy can be pickled, traced and passed to ``torch.export``.

        Norms of each example's statistics compute as in eval mode, whatever the mode. A recurrent layer with amplitudes
        takes padded tensors, no ``PackedSequence``.

        Raises:
            SpecError: norms leave out padding that the model's arguments name, or a head is fed from layers inside and
                torch.fx cannot trace the model.

        Example:
            >>> import torch, conservtl as ctl
            >>> source, model = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
            >>> plain = ctl.adapt(model, source, [ctl.LHUC()]).export()
            >>> torch.export.export(plain, (torch.zeros(1, 4),)).module()(torch.zeros(1, 4)).shape
            torch.Size([1, 2])
        """
        return _export.export(self.bound)

    def restore_weights(self) -> None:
        """Restore plain weights if an update (Mixout) replaced them for a forward pass that no step followed.

        Saving or evaluating the model, and the methods here, do this by themselves. Call it before you read the
        weights in another way after a step that a scaler skipped.
        """
        self.bound.restore_weights()

    def pull(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled pull to the gradients now, to clip it with them: backward, pull, clip, step.

        The next step then adds nothing. A decoupled pull is no gradient, and stays in the step. To discard gradients
        without a step, set them to None (torch's default), not to zero.

        Args:
            scaler: the GradScaler of an fp16 loop; gradients that are still scaled are unscaled first.

        Raises:
            SpecError: no optimizer has been made yet.
        """
        if self.bound.hook is None:
            raise SpecError("pull() acts before a step of adaptation.optimizer(...): make that optimizer first.")
        self.bound.hook.add(scaler)

    def penalty(self) -> Tensor:
        """Return the sum of the plan's penalties over the parameters that are trained now, a scalar with gradient.

        For ``L2SP`` it is alpha/2 |w_S - w0|^2 + beta/2 |w_N|^2. Log it, or add it to the loss if the optimizer was
        made with ``pull=False``. With sharded parameters all processes call this, and ``drift()``, together.

        Raises:
            SpecError: a penalty reads a measurement that has not been made.
        """
        return total_penalty(self.bound, self.bound.parameters())

    def drift(self) -> dict[str, float]:
        """Return layer -> |w - w0| / |w0| over its parameters from the source; fresh layers are left out."""
        self.restore_weights()
        self.bound.parameters()
        return self.bound.anchors.drift(self.plan, self.model)

    def start_phase(self, phase: int) -> None:
        """Begin a phase: freeze what it freezes, train the rest, scale the optimizer's rates.

        A scheduler of torch keeps its first rates: make a new one after this, or let ``adaptation.scheduler(...)`` make
        one that goes on over phases.

        Args:
            phase: position in ``plan.phases``.

        Raises:
            SpecError: the plan has no such phase.
        """
        self.bound.start_phase(phase)

    def keep_frozen(self) -> None:
        """Freeze again what the current phase freezes, after other code has changed it."""
        self.bound.keep_frozen()

    def state_dict(self) -> dict[str, Any]:
        """Return what restores this adaptation, beside the model's and the optimizer's own state dicts."""
        return _state.state_dict(self.bound)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore plan facts, anchors, measurements, phase and frozen parameters, by name.

        Raises:
            PlanError: the state belongs to another plan; the message names the first row that differs.
        """
        _state.load_state_dict(self.bound, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adaptation:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__, bound=deep_copy(self.bound, memo))  # a transfer's report never changes
        return copied

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"
