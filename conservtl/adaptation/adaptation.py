"""The plan bound to a model: anchors kept, optimizers made, what is measured first and done last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.hooks import RemovableHandle

from conservtl.batches import check_batches
from conservtl.errors import PlanError, SpecError
from conservtl.functions import Forward, Loss, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.kernels.dtensor import whole
from conservtl.layers import Layer, named_parameters, unwrap
from conservtl.methods import Strategy, apply_all
from conservtl.methods.norm_adaptation.instance_statistics import mix_instances, mixable
from conservtl.plan.decision import FinishContext, Measure, View
from conservtl.plan.plan import Plan
from conservtl.runtime.anchors import Anchors, differs
from conservtl.runtime.freezing import freeze, hold_statistics, holds, norms_with_rows
from conservtl.runtime.measuring import check_importance, measure
from conservtl.runtime.model_hooks import ForwardHook, StateDictHook
from conservtl.runtime.param_groups import build_optimizer
from conservtl.runtime.step_hook import StepHook
from conservtl.runtime.term_runner import TermRunner
from conservtl.runtime.update_runner import UpdateRunner
from conservtl.source.read import TransferReport

__all__ = ["Adaptation", "Origin"]


@dataclass(frozen=True)
class Origin:
    """What a plan was drawn up from.

    Args:
        drawn: the plan before any strategy.
        strategies: in the order they were given.
        source_model: the source model, where a term or a measurement looks at it.
        head: name of the head's module, where the target has labels of its own.
    """

    drawn: Plan
    strategies: tuple[Strategy, ...] = ()
    source_model: nn.Module | None = None
    head: str | None = None


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(plain_forward(model, batch), batch)


class Adaptation:
    """A model with its plan, and what is needed to train it by it.

    Args:
        model: the model, already at its starting point.
        plan: the decisions.
        transfer: what was copied.
        layers: the model's layers.
        origin: what the plan was drawn up from.

    A deep copy, or one reloaded from a pickle, goes on with its own model, anchors and phase, and makes
    its own optimizer: an optimizer that was copied has lost the pull, as torch drops its hooks.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, transfer: TransferReport, layers: tuple[Layer, ...], origin: Origin
    ) -> None:
        self.model = model
        self.plan = plan
        self.transfer = transfer
        self.layers = layers
        self.origin = origin
        self.phase = 0
        self.measured: dict[str, dict[str, Tensor]] = {}
        self._anchors = Anchors(model, {row.name for row in plan.rows if row.origin == "source"})
        self._hook: StepHook | None = None
        self._listening: tuple[RemovableHandle, ...] = ()
        self._bind()
        self.start_phase(0)

    def _bind(self) -> None:
        """Make what carries the plan's terms and updates out."""
        self._terms = TermRunner(self.plan, self.model, self._modules(), self.origin.source_model, self.origin.head)
        self._updates = UpdateRunner(self.plan.updates)
        self._listen()

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
        self._require_measured()
        check_importance(self.plan, self.measured)
        self.keep_frozen()  # a process group may have come since
        scale = self.plan.phases[self.phase].scale
        optimizer = build_optimizer(cls, self.plan, named_parameters(self.model), scale, options)
        self._anchors.forget()
        self._hook = StepHook(
            optimizer,
            self.plan,
            lambda: self.frozen,
            self._anchor,
            self._importance,
            lambda: self._anchors.placed,
            self._updates,
            self._terms.check_added,
            pull,
        )
        return optimizer

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
                f"loss() takes the mean over the batch, a scalar; received shape {tuple(loss.shape)}. Reduce it first."
            )
        if not self.plan.terms:
            return loss
        if source is None and self._terms.needs_source:
            if inputs is None:
                by = next(term.by for term in self.plan.terms if term.source)
                raise SpecError(
                    f"{by} compares with the source model on the same inputs: pass loss(loss, outputs, inputs)."
                )
            source = self.source_view(inputs)
        return self._terms.objective(loss, outputs, source, self.measured)

    def source_view(self, inputs: Any, forward: Forward | None = None) -> View | None:
        """What the source model makes of inputs: outputs and tapped features; None where no term looks at it.

        Args:
            inputs: as the model takes them, or a batch that ``forward`` takes.
            forward: (model, batch) -> outputs; None calls the model with ``inputs``.
        """
        device = next(iter(named_parameters(self.model).values())).device
        return self._terms.source_view(lambda model: (forward or _call)(model, inputs), device)

    @property
    def terms(self) -> TermRunner:
        """What adds the plan's terms to a loss."""
        return self._terms

    def _require_measured(self) -> None:
        if outstanding := self.outstanding():
            one = outstanding[0]
            raise SpecError(f"{one.by} needs a measurement first ({one.describe()}). {one.remedy}")

    def outstanding(self) -> tuple[Measure, ...]:
        """What must be measured before an optimizer can be made."""
        return tuple(one for one in self.plan.measures if one.name not in self.measured)

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
        for one in self.outstanding():
            if one.data == on and not one.tried:
                source = on == "source" and self.origin.source_model is not None
                model = self.origin.source_model if source and self.origin.source_model is not None else self.model
                self.measured[one.name] = measure(one, model, batches, self._modules(), forward, loss, autocast)
                one.use(unwrap(self.model), self.measured[one.name])

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
        self._anchors.forget()
        wanted[name].use(unwrap(self.model), own)

    def replan(self, **facts: str) -> None:
        """Draw the plan up again with what was found out; before an optimizer is made.

        Args:
            facts: name -> what strategies read in ``plan.facts``.

        Raises:
            PlanError: the new plan copies other layers than were copied.
        """
        plan = apply_all(self.origin.drawn.with_facts({**self.plan.facts, **facts}), self.origin.strategies)
        if [row.origin for row in plan.rows] != [row.origin for row in self.plan.rows]:
            raise PlanError(f"the facts {facts} change which layers are copied, but they are copied already.")
        self.plan = plan
        self._terms.detach()
        self._bind()
        self.start_phase(0)

    def finish(
        self,
        batches: Iterable[Any] | None = None,
        *,
        forward: Forward = plain_forward,
        score: Callable[[], float] | None = None,
        valid: Iterable[Any] | None = None,
        objective: Callable[[nn.Module, Any], Tensor] = _cross_entropy,
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
        for name, given in {"batches": batches, "valid": valid}.items():
            if given is not None and self.plan.after:
                check_batches(given, f"finish({name}=...)")
        self.restore_weights()
        found: dict[str, Any] = {}
        for one in self.plan.after:
            if type(one).scored and score is None and valid is None:
                raise SpecError(
                    f"{one.by} chooses on a validation part: pass score or valid, or give fit valid={{...}}."
                )
            ending = FinishContext(unwrap(self.model), self.start, batches, forward, score, valid, objective, margin)
            with torch.no_grad():
                found[one.name] = one.finish(ending)
        return found

    @property
    def start(self) -> dict[str, Tensor]:
        """The starting point of what came from the source, on the CPU: parameters and buffers by name."""
        copied = set(self.transfer.copied)
        buffers = {name: buffer for name, buffer in self._anchors.buffers.items() if name in copied}
        return {**buffers, **self._anchors.parameters}

    def merged(self) -> nn.Module:
        """A copy of the model without what strategies added to it, where that can be merged into the weights exactly.

        What cannot be merged stays in it. Where nothing was added it is a plain copy.
        """
        self.restore_weights()
        model = copy.deepcopy(unwrap(self.model))
        for one in self.origin.strategies:
            one.merge(model)
        return model

    def restore_weights(self) -> None:
        """Put the weights back that an update has replaced for a training pass (Mixout), where no step followed it.

        Saving the model, evaluating it and the methods here do so by themselves; call it where you read the weights
        otherwise after a step that a scaler skipped.
        """
        if self._hook is not None:
            self._hook.prepare(training=False)

    def pull(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled pull to the gradients now, for those who clip: backward, pull, clip, step.

        The next step then adds nothing. A decoupled pull is no gradient, and stays in the step. To throw away what
        ``backward`` and ``pull`` made, without a step, set gradients to None (torch's default), not to zero.

        Args:
            scaler: the GradScaler of an fp16 loop; gradients still scaled are unscaled first.

        Raises:
            SpecError: no optimizer has been made yet.
        """
        if self._hook is None:
            raise SpecError("pull() acts before a step of adaptation.optimizer(...): make that optimizer first.")
        self._hook.add(scaler)

    def penalty(self) -> Tensor:
        """The penalty, alpha/2 |w_S - w0|^2 + beta/2 |w_N|^2, over what is trained now; a scalar with gradient.

        For a log, or for the loss of a loop whose optimizer was made with ``pull=False``. Where parameters
        are sharded, all processes call it together, and ``drift()`` too.

        Raises:
            SpecError: what weighs the pull must be measured first.
        """
        terms = []
        parameters = named_parameters(self.model)
        for row in self.plan.rows:
            if row.name in self.frozen:
                continue
            parameter = parameters[row.name]
            if row.pull is not None:
                strength = row.pull if row.anneal is None else row.pull * row.anneal.factor(self._updates.number)
                square = (parameter - self._anchor(row.name, parameter).to(parameter.device)).square()
                importance = self._importance(row.name, parameter)
                terms.append(strength / 2 * (square if importance is None else square * importance).sum())
            elif row.decay is not None:
                terms.append(row.decay / 2 * parameter.square().sum())
        if not terms:
            return torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
        return whole(torch.stack([term.to(terms[0].device) for term in terms]).sum())

    def drift(self) -> dict[str, float]:
        """How far each layer has moved: |w - w0| / |w0| over its parameters from the source; fresh layers left out."""
        self.restore_weights()
        return self._anchors.drift(self.plan, self.model)

    @property
    def frozen(self) -> frozenset[str]:
        """Parameters that the current phase does not train."""
        return self._frozen

    def start_phase(self, phase: int) -> None:
        """Begin a phase: freeze what it freezes, train the rest, scale the optimizer's rates.

        A scheduler of torch's keeps the rates it began with: make a new one after this.

        Args:
            phase: position in ``plan.phases``.

        Raises:
            SpecError: the plan has no such phase.
        """
        phases = self.plan.phases
        if not 0 <= phase < len(phases):
            raise SpecError(f"phase must be one of 0 to {len(phases) - 1}; received {phase}.")
        self.restore_weights()
        self.phase = phase
        self._frozen = self.plan.frozen_in(phase)
        self.keep_frozen()
        scale = phases[phase].scale
        for group in self._hook.optimizer.param_groups if self._hook else ():
            # The group says what is in its rates: its state may have been loaded before this one's.
            factor = scale / group.get("phase_scale", scale)
            first = group.get("initial_lr", group["lr"])
            group |= {"lr": group["lr"] * factor, "initial_lr": first * factor, "phase_scale": scale}

    def keep_frozen(self) -> None:
        """Freeze again what the current phase freezes, after something else has touched it."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        keep = self.plan.trained if distributed and torch.distributed.get_world_size() > 1 else ()
        freeze(named_parameters(self.model), self._frozen, keep)
        model = unwrap(self.model)
        norms = norms_with_rows(model, self.plan.rows, self.layers)
        hold_statistics(norms, [norm for norm, rows in norms.items() if holds(rows, self._frozen)], model.training)
        shares = {norm: max((row.instance for row in rows), default=0.0) for norm, rows in norms.items()}
        mix_instances({norm: share for norm, share in shares.items() if mixable(norm)})

    def state_dict(self) -> dict[str, Any]:
        """What brings this adaptation back, beside the model's and the optimizer's own state dicts."""
        self.restore_weights()
        return {
            **self._anchors.state_dict(),
            "phase": self.phase,
            "plan": self.plan.model_dump(mode="json"),
            "measured": {name: dict(found) for name, found in self.measured.items()},
            "updates": self._updates.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring back anchors, phase and frozen state, by name.

        Raises:
            PlanError: the state belongs to another plan; the message names the first row that differs.
        """
        try:
            plan, phase, start = Plan(**state["plan"]), state["phase"], state["start"]
        except (KeyError, TypeError, ValidationError) as error:
            raise PlanError(f"this is no state of an adaptation: {error}. Load what state_dict() gave.") from error
        if plan.facts != self.plan.facts:
            self.replan(**plan.facts)
        if plan != self.plan:
            ours = {row.name: row for row in self.plan.rows}
            fields = (name for name in Plan.model_fields if getattr(plan, name) != getattr(self.plan, name))
            other = next((repr(row.name) for row in plan.rows if ours.get(row.name) != row), f"its {next(fields)}")
            raise PlanError(
                f"this state belongs to another plan: {other} differs. Load it into an adaptation made "
                "from the same model, source and strategies."
            )
        if not self._anchors.fits(state):
            raise PlanError("this state's anchors are not those of this adaptation. Load what state_dict() gave.")
        if self.origin.source_model is not None and (moved := differs(self.origin.source_model, start)):
            raise PlanError(
                f"this state belongs to another source model: it began with other values in {moved!r}. Load it into an "
                "adaptation made from the same source."
            )
        self._anchors.load_state_dict(state)
        self.measured = {name: dict(found) for name, found in state["measured"].items()}
        self._updates.load_state_dict(state["updates"])
        self.start_phase(phase)

    def __getstate__(self) -> dict[str, Any]:
        self.restore_weights()
        return {**self.__dict__, "_hook": None, "_listening": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._terms.attach(self.model)
        self._listen()

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"

    def _anchor(self, name: str, parameter: Tensor) -> Tensor:
        """Where a parameter started, held as the plan says."""
        return self._anchors.of(name, parameter, self.plan[name].anchor)

    def _importance(self, name: str, parameter: Tensor) -> Tensor | None:
        """What weighs the pull of a parameter's elements."""
        measure = self.plan[name].importance
        if measure is not None and measure not in self.measured:
            self._require_measured()
        return None if measure is None else self._anchors.weighing(measure, self.measured[measure], name, parameter)

    def _modules(self) -> dict[str, str]:
        """Layer -> the module whose output is the layer's: the last of those that make it up."""
        return {layer.name: layer.modules[-1] for layer in self.layers if layer.modules}

    def _listen(self) -> None:
        """Let updates act before each forward pass, where one wants to."""
        for handle in self._listening:
            handle.remove()
        self._listening = ()
        if self._updates.listens:
            model = unwrap(self.model)
            self._listening = (
                model.register_forward_pre_hook(ForwardHook(self)),
                model.register_state_dict_pre_hook(StateDictHook(self)),  # type: ignore[no-untyped-call]
            )

    def before_forward(self, *, training: bool) -> None:
        """Let updates act before a forward pass; a hook of the model calls it where one wants to."""
        if self._hook is not None:
            self._hook.prepare(training=training)


def _call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs as a caller gives them."""
    if isinstance(inputs, Mapping):
        return plain_forward(model, inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
