"""The adaptation: a model with its plan, as a user trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from conservtl.adaptation import _finishing, _state
from conservtl.adaptation.bound_plan import BoundPlan, Origin
from conservtl.errors import SpecError
from conservtl.functions import Forward, Loss, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import Layer, named_parameters, unwrap
from conservtl.plan.decision import Measure, Search, View
from conservtl.plan.plan import Plan
from conservtl.runtime.measuring import check_importance, measure
from conservtl.runtime.penalty_runner import total_penalty
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
        """Starting point of everything copied from the source, on the CPU: parameters and buffers by name."""
        copied = set(self.transfer.copied)
        anchors = self.bound.anchors
        return {**{name: buffer for name, buffer in anchors.buffers.items() if name in copied}, **anchors.parameters}

    def optimizer(
        self, cls: Callable[..., torch.optim.Optimizer], *, pull: bool = True, **options: Any
    ) -> torch.optim.Optimizer:
        """An optimizer with the plan's rates in its groups and the pull in its step.

        The pull acts before the step, after any clipping of your own; call ``pull()`` before you clip
        to have it clipped with the rest, as a term in the loss would be. Call this after the model has
        been moved, wrapped or sharded.

        Args:
            cls: any optimizer class that takes groups and dense gradients.
            pull: False for those who put ``penalty()`` into their loss.
            options: passed to ``cls``; ``lr`` is the rate that the plan's ratios multiply.

        Raises:
            SpecError: the optimizer cannot carry the plan out, or something must be measured first; the message says
                why.
        """
        return self.bound.make_optimizer(cls, options, pull=pull)

    def loss(self, loss: Tensor, outputs: Any, inputs: Any = None, *, source: View | None = None) -> Tensor:
        """The task's loss with the plan's terms on outputs and features: what to call ``backward`` on.

        Without such terms it is the loss as it is.

        Args:
            loss: of the task, a scalar, the mean over the batch.
            outputs: what the model gave in the forward pass just made.
            inputs: what it was given: a tensor, a tuple of positional or a dictionary of keyword arguments. The
                source model is run on the same, in eval mode, under the autocast that is active here.
            source: instead of ``inputs``: what ``source_view(inputs)`` gave, kept from an earlier epoch.

        Raises:
            SpecError: the loss is no scalar, the source's view is needed and neither is given, or the model made no
                forward pass.
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
            source = self.source_view(inputs)
        return terms.objective(loss, outputs, source, self.measured)

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
        """Measure what the plan asks for on this data, once, before training.

        Many processes: all call it together, on the same data, before the model is wrapped.

        Args:
            batches: a list, a DataLoader or the like of (inputs, labels), or of what ``forward`` and ``loss`` take;
                gone through more than once.
            on: whether they are the target's or the source's; the plan says what it needs.
            forward: (model, batch) -> outputs.
            loss: (outputs, batch) -> scalar, the mean over the batch.
            autocast: makes the context of each forward pass.

        Raises:
            DataError: there are no batches, a single one, or a generator of them.
            SpecError: the model cannot be measured so; the message says why.
        """
        for one in self.bound.unmeasured():
            if one.data == on:
                model = self.origin.source_model if on == "source" else None
                found = measure(
                    one, self.model if model is None else model, batches, self.bound.modules(), forward, loss, autocast
                )
                self.measured[one.name] = found
                one.use(unwrap(self.model), found)

    def use_measured(self, name: str, found: Mapping[str, Tensor]) -> None:
        """Take a measurement that was made before, instead of measuring: a Fisher that was saved with a run, say.

        Args:
            name: of the measurement, as the plan has it.
            found: name -> tensor, as ``measured[name]`` holds it.

        Raises:
            SpecError: the plan has no such measurement, or it does not fit the model.
        """
        wanted = {one.name: one for one in self.plan.measures}
        if name not in wanted:
            raise SpecError(f"use_measured: the plan measures {sorted(wanted)}; received {name!r}. Use one of those.")
        own = {key: tensor.detach().to("cpu", copy=True) for key, tensor in found.items()}
        wanted[name].verify(own)
        check_importance(self.plan, {name: own})
        self.measured[name] = own
        self.bound.anchors.forget()
        wanted[name].use(unwrap(self.model), own)

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
        """Do what the plan asks for once training is over; ``fit`` does so by itself.

        Args:
            batches: the training data's, for what recomputes statistics; gone through more than once.
            forward: (model, batch) -> outputs.
            score: () -> score of the model as it is, on a validation part; higher is better.
            valid: the validation part's batches, to be gone through more than once.
            objective: (model, batch of ``valid``) -> its loss, a scalar.
            margin: differences of the score that are no more than chance: what half an example is worth, say.

        Returns:
            What a report may want to say.
        """
        return _finishing.finish(self.bound, self.start, batches, forward, score, valid, objective, margin)

    def merged(self) -> nn.Module:
        """A copy of the model without what strategies added to it, where that can be merged into the weights exactly.

        What cannot be merged stays in it. Where nothing was added it is a plain copy.
        """
        return _finishing.merged(self.bound)

    def restore_weights(self) -> None:
        """Put the weights back that an update has replaced for a training pass (Mixout), where no step followed it.

        Saving the model, evaluating it and the methods here do so by themselves; call it where you read the weights
        otherwise after a step that a scaler skipped.
        """
        self.bound.restore_weights()

    def pull(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled pull to the gradients now, for those who clip: backward, pull, clip, step.

        The next step then adds nothing. A decoupled pull is no gradient, and stays in the step. To throw away what
        ``backward`` and ``pull`` made, without a step, set gradients to None (torch's default), not to zero.

        Args:
            scaler: the GradScaler of an fp16 loop; gradients still scaled are unscaled first.

        Raises:
            SpecError: no optimizer has been made yet.
        """
        if self.bound.hook is None:
            raise SpecError("pull() acts before a step of adaptation.optimizer(...): make that optimizer first.")
        self.bound.hook.add(scaler)

    def penalty(self) -> Tensor:
        """Return the sum of the plan's penalties over what is trained now, a scalar with gradient.

        For ``L2SP`` it is alpha/2 |w_S - w0|^2 + beta/2 |w_N|^2.

        For a log, or for the loss of a loop whose optimizer was made with ``pull=False``. Where parameters
        are sharded, all processes call it together, and ``drift()`` too.

        Raises:
            SpecError: a penalty reads what is not measured yet.
        """
        return total_penalty(self.bound, named_parameters(self.model))

    def drift(self) -> dict[str, float]:
        """How far each layer has moved: |w - w0| / |w0| over its parameters from the source; fresh layers left out."""
        self.restore_weights()
        return self.bound.anchors.drift(self.plan, self.model)

    def start_phase(self, phase: int) -> None:
        """Begin a phase: freeze what it freezes, train the rest, scale the optimizer's rates.

        A scheduler of torch's keeps the rates it began with: make a new one after this.

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

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"
