"""A plan bound to a model: the part of an adaptation that training itself calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conservtl.compat import forget_graphs, guard_hooks
from conservtl.errors import SpecError
from conservtl.functions import Forward
from conservtl.labels import call_with
from conservtl.layers import Layer, named_parameters, unwrap
from conservtl.plan.decision import Measure, Search, apply_extensions
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.term import View
from conservtl.runtime.anchors import Anchors
from conservtl.runtime.freezing import freeze, hold_statistics, holds, let_train, norms_with_rows
from conservtl.runtime.measuring import check_importance
from conservtl.runtime.model_check import ModelRecord, check_members, checked_parameters
from conservtl.runtime.model_hooks import ForwardHook, StateDictHook, remove_hooks
from conservtl.runtime.omissions import Endings, ExportHook, ForeignSteps, SaveHook, recognise
from conservtl.runtime.param_groups import build_optimizer
from conservtl.runtime.runners import UpdateRunner
from conservtl.runtime.step_hook import StepHook
from conservtl.runtime.term_runner import OtherPass, TermRunner
from conservtl.source.shared import SharedModel

__all__ = ["BoundPlan"]


class BoundPlan:
    """A plan bound to a model's tensors: phases, freezing, anchors, terms, updates and the optimizer's step hook.

    A copy is as for ``Adaptation``.

    Args:
        model: already at its starting point.
        plan: the decisions.
        layers: the model's layers.
        source_model: computes the source's function, if a term needs it.
        heads: names of the head's modules if the target has labels of its own.
        norms_in_eval: whether batch norms keep their statistics in loops other than ``fit``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        layers: tuple[Layer, ...],
        source_model: nn.Module | SharedModel | None,
        heads: tuple[str, ...],
        *,
        norms_in_eval: bool,
    ) -> None:
        self.model = model
        self.layers = layers
        self._source_model, self._heads = source_model, heads
        self.measured: dict[str, dict[str, Tensor]] = {}
        """Measurements: name -> their tensors on the CPU."""
        self.anchors = Anchors(model)
        self._handed_in = ModelRecord(model)
        self._optimized = self._handed_in
        self.hook: StepHook | None = None
        self.endings = Endings()
        self._norms_in_eval = norms_in_eval
        self.penalty_in_gradients = False
        """Whether the gradients hold that of ``penalty()`` already."""
        self._revision = 0
        self._handles: list[RemovableHandle] = []
        self.phase = 0
        self.frozen: frozenset[str] = frozenset()
        """Parameters that the current phase does not train."""
        self._bind(plan)
        self._watch()

    def _watch(self) -> None:
        """Notice steps of other optimizers, and an end of training that is left out; take the hooks along."""
        self._foreign = ForeignSteps(self)
        weakref.finalize(self, self.endings.deleted)
        weakref.finalize(self, remove_hooks, self._handles)

    def _bind(self, plan: Plan) -> None:
        """Build the runners of a plan's terms and updates, and begin its first phase."""
        self.anchors.keep(self.model, plan)
        self.plan = plan
        let_train(self.model, [row.name for row in plan.rows if row.found == "frozen" and not row.frozen])
        self.terms = TermRunner(plan, self.model, self.modules(), self._source_model, self._heads)
        self.updates = UpdateRunner(plan.updates)
        self.endings.bind(plan)
        self.register_hooks()
        self.start_phase(0)

    def bind_again(self, plan: Plan) -> None:
        """Take another plan of the same origins, before an optimizer is made."""
        self.terms.detach()
        self._bind(plan)

    def unmeasured(self) -> tuple[Measure, ...]:
        """Measurements of the plan that have not been made."""
        return tuple(measure for measure in self.plan.measures if measure.name not in self.measured)

    def outstanding(self) -> tuple[Measure | Search, ...]:
        """Measurements and searches still to be made before an optimizer can be made."""
        return (*self.unmeasured(), *self.plan.searches)

    def check_measured(self) -> None:
        """Raise unless every measurement and search of the plan has been made."""
        if outstanding := self.outstanding():
            first = outstanding[0]
            kind = "search" if isinstance(first, Search) else "measurement"
            raise SpecError(f"{first.by} needs a {kind} first ({first.describe()}). {first.remedy}")

    def make_optimizer(
        self, cls: Callable[..., torch.optim.Optimizer], options: dict[str, Any], *, pull: bool
    ) -> torch.optim.Optimizer:
        """Return an optimizer with the plan's groups, and hook the pull and the updates into its step."""
        parameters = self.parameters()
        self._handed_in.check_copied(self.plan, self.model, self.anchors.parameters)
        self.check_measured()
        check_importance(self.plan, self.measured)
        self._follow_modules()
        self.keep_frozen()  # a process group may have been initialised since
        scale = self.plan.phases[self.phase].scale
        optimizer, inner = build_optimizer(cls, self.plan, parameters, scale, options)
        self.anchors.forget()
        self._optimized = ModelRecord(self.model)
        recognise(optimizer)
        self.hook = StepHook(optimizer, self, inner=inner, penalties=pull)
        return optimizer

    def _follow_modules(self) -> None:
        """Take modules that replaced others since adapt, with their parameters, for those of the plan."""
        theirs = {row.name for row in self.plan.rows if row.as_found}
        moved = self._handed_in.moved(self.model)
        let_train(self.model, [name for name in moved if name in self.frozen and name not in theirs])
        self.terms.follow(self.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters by name; raise if they are no longer those of the plan."""
        return checked_parameters(self.plan, self.model)

    def check_model(self, members: Iterable[tuple[str, Tensor]]) -> None:
        """Raise if the model has changed since the optimizer was made; called at its first step."""
        check_members(members, self.parameters())
        self.terms.check_taps(self.model)
        held = any(holds(rows, self.frozen) for rows in self._norms().values())
        does = [*(["statistics held"] if held else []), *(extension.by for extension in self.plan.extensions)]
        self._optimized.check_norms(self.model, does)

    @property
    def revision(self) -> int:
        """A number that grows whenever the plan, the phase, the anchors or a measurement changes."""
        return self._revision + self.anchors.revision

    def start_phase(self, phase: int) -> None:
        """Begin a phase: freeze what it freezes, train the rest, scale the optimizer's rates."""
        phases = self.plan.phases
        if not isinstance(phase, int) or not 0 <= phase < len(phases):
            raise SpecError(f"phase must be one of 0 to {len(phases) - 1}; received {phase!r}.")
        self.restore_weights()
        self.phase = phase
        self.frozen = self.plan.frozen_in(phase)
        self._revision += 1
        self.keep_frozen()
        self.endings.started(phase)
        if self.hook is not None:
            self.hook.rates.scale(phases[phase].scale)

    def keep_frozen(self) -> None:
        """Freeze again what the current phase freezes, after other code has changed it."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        keep = self.plan.trained if distributed and torch.distributed.get_world_size() > 1 else ()
        if freeze(self.model, self.frozen, keep):
            forget_graphs()  # those made before give no gradient to what is trained from now on
        model, norms = unwrap(self.model), self._norms()
        held = [norm for norm, rows in norms.items() if self._norms_in_eval or holds(rows, self.frozen)]
        hold_statistics(norms, held, model.training)
        apply_extensions(model, self.plan.extensions, self.layers)  # again: norms may have been converted since

    @contextmanager
    def norms_left_to_loop(self) -> Iterator[None]:
        """Hold inside the block only the norms that the plan holds, whatever the settings that came with it."""
        held, self._norms_in_eval = self._norms_in_eval, False
        self.keep_frozen()
        try:
            yield
        finally:
            self._norms_in_eval = held
            self.keep_frozen()

    def _norms(self) -> dict[nn.Module, list[Row]]:
        return norms_with_rows(unwrap(self.model), self.plan.rows, self.layers)

    def source_view(self, inputs: Any, forward: Forward | None = None, outputs: Any = None) -> View | None:
        """Return the source model's outputs and tapped features for a batch; None unless a term needs them.

        Arguments as for ``Adaptation.source_view``. ``outputs`` are the adapted model's, whose shape the source's must
        have; None: not checked.
        """
        device = next(iter(named_parameters(self.model).values())).device
        return self.terms.source_view(lambda model: (forward or _call)(model, inputs), device, inputs, outputs)

    def objective(
        self,
        loss: Tensor,
        outputs: Any,
        source: View | None,
        batch: Any,
        share: float | Tensor,
        others: Callable[[], OtherPass] | None = None,
    ) -> Tensor:
        """Return the loss with the plan's terms, and note how the terms took the outputs.

        Arguments as for ``TermRunner.objective``.
        """
        total = self.terms.objective(loss, outputs, source, self.measured, batch, share, others)
        if self.terms.found is not None:
            self.plan = self.plan.with_notes((*self.plan.notes, self.terms.found))
            self.terms.found = None
        return total

    def before_forward(self, *, training: bool) -> None:
        """Let updates act before a forward pass; called by a hook of the model if an update needs it."""
        if self.hook is not None:
            self.hook.prepare(training=training)

    def restore_weights(self) -> None:
        """Restore plain weights if an update (Mixout) replaced them for a forward pass."""
        self.before_forward(training=False)

    def modules(self) -> dict[str, str]:
        """Layer -> name of the module whose output is the layer's: the last of its modules."""
        return {layer.name: layer.modules[-1] for layer in self.layers if layer.modules}

    def register_hooks(self) -> None:
        """Register hooks for updates that act before forward passes, and for an end of training that is left out."""
        remove_hooks(self._handles)
        model, handles = unwrap(self.model), self._handles  # one list always: the finalizer holds it
        if self.updates.listens:
            handles.append(model.register_forward_pre_hook(ForwardHook(self)))
            guard_hooks()
            handles.append(model.register_state_dict_pre_hook(StateDictHook(self)))  # type: ignore[no-untyped-call]
        if not self.endings.complete:
            handles.append(model.register_forward_pre_hook(ExportHook(self.endings)))
            handles.append(model.register_state_dict_post_hook(SaveHook(self.endings)))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        self.restore_weights()
        return {**self.__dict__, "hook": None, "_handles": [], "_handed_in": None, "_optimized": None, "_foreign": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handed_in = self._optimized = ModelRecord(self.model)
        self.terms.attach(self.model)
        self.register_hooks()
        self._watch()


def _call(model: nn.Module, inputs: Any) -> Any:
    """Call the model on inputs as a caller gives them."""
    try:
        return call_with(model, inputs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise SpecError(
            "inputs must be all that the model is called with: a tensor, a tuple or list of positional or a dictionary "
            f"of keyword arguments; with a {type(inputs).__name__} the source model raises TypeError: {error}. Write "
            "adaptation.loss(loss, outputs, inputs=(a, b)) for model(a, b)."
        ) from error
