"""The plan bound to a model: weights copied, anchors kept, optimizers made. Prepares, never trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from conservtl.conserve.freeze import freeze, hold_statistics, tracks_statistics
from conservtl.conserve.groups import build_optimizer
from conservtl.conserve.hook import StepHook
from conservtl.conserve.pull import place_like, whole
from conservtl.errors import PlanError, SpecError
from conservtl.layers import Layer, canonical, find_layers, layer_of, named_parameters, select, unwrap
from conservtl.plan import Plan
from conservtl.source import SourceLike, TransferReport, check_structure, read_source
from conservtl.strategies import Strategy, apply_all, as_strategy
from conservtl.transfer import transfer

__all__ = ["Adaptation", "adapt"]


def adapt(
    model: nn.Module,
    source: SourceLike,
    strategies: Sequence[Strategy | Mapping[str, Any]] = (),
    *,
    example: Any = None,
    layers: Sequence[str] | None = None,
    fresh: Sequence[str] | Mapping[str, str] = (),
    allow: Sequence[str] = (),
) -> Adaptation:
    """Prepares and never trains: draws up the plan, copies the source's weights, fixes the anchors.

    The model is changed in place (``adaptation.model is model``), after everything has been checked.
    Many processes: initialise the process group first, adapt, then wrap.

    Args:
        model: built for the target task, on any device.
        source: a path, a state dict or a model; see ``read_source``.
        strategies: their order does not matter. None at all is plain fine-tuning.
        example: a batch as the model takes it (a tensor, a tuple of positional or a dictionary of
            keyword arguments); finds the order of layers by running a copy of the model once.
        layers: globs of parameter names, input side first, to say yourself what the layers are.
        fresh: globs of parameters or layers not to be copied even where they fit, a head for other labels
            say; as a mapping, glob -> the reason that the plan gives.
        allow: globs of modules that may be missing in the model, or built differently than in a
            source that is a model.

    Raises:
        InputError: one of its kinds, with what to mend.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> adaptation.penalty().item()
        0.0
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module; received {type(model).__name__}.")
    if isinstance(strategies, (Strategy, str)):
        raise SpecError(f"strategies must be a list: write [{strategies!r}].")
    chosen = [as_strategy(strategy) for strategy in strategies]
    parts = find_layers(model, example, layers)
    read = read_source(source)
    if read.module is not None and read.module is not unwrap(model):
        check_structure(model, read.module, allow)
    read = read.matched(map(canonical, unwrap(model).state_dict()))
    read.check_finite(other_than=_masks(model))
    values = read.values_of(parts)
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    fixed = [name for name, parameter in named_parameters(model).items() if not parameter.is_floating_point()]
    plan = apply_all(Plan.draw(parts, shapes, _declared(parts, fresh), fixed), chosen)
    report = transfer(model, parts, plan, values, read)
    return Adaptation(model, plan, report, parts)


class Adaptation:
    """A model with its plan, and what is needed to train it by it.

    Args:
        model: the model, already at its starting point.
        plan: the decisions.
        transfer: what was copied.
        layers: the model's layers.

    A deep copy, or one reloaded from a pickle, goes on with its own model, anchors and phase, and makes
    its own optimizer: an optimizer that was copied has lost the pull, as torch drops its hooks.
    """

    def __init__(self, model: nn.Module, plan: Plan, transfer: TransferReport, layers: tuple[Layer, ...]) -> None:
        self.model = model
        self.plan = plan
        self.transfer = transfer
        self.layers = layers
        self.phase = 0
        parameters = named_parameters(model)
        self._start = {
            row.name: parameters[row.name].detach().to("cpu", copy=True) for row in plan.rows if row.origin == "source"
        }
        self._anchors: dict[str, Tensor] = {}
        self._hook: StepHook | None = None
        self.start_phase(0)

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
            SpecError: the optimizer cannot carry the plan out; the message says why.
        """
        self.keep_frozen()  # a process group may have come since
        scale = self.plan.phases[self.phase].scale
        optimizer = build_optimizer(cls, self.plan, named_parameters(self.model), scale, options)
        self._anchors.clear()
        self._hook = StepHook(optimizer, self.plan, lambda: self.frozen, self._anchor, pull)
        return optimizer

    def pull(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled pull to the gradients now, for those who clip: backward, pull, clip, step.

        The next step then adds nothing. A decoupled pull is no gradient, and stays in the step.

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
        """
        terms = []
        parameters = named_parameters(self.model)
        for row in self.plan.rows:
            if row.name in self.frozen:
                continue
            parameter = parameters[row.name]
            if row.pull is not None:
                terms.append(row.pull / 2 * (parameter - self._anchor(row.name, parameter)).square().sum())
            elif row.decay is not None:
                terms.append(row.decay / 2 * parameter.square().sum())
        if not terms:
            return torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
        return whole(torch.stack([term.to(terms[0].device) for term in terms]).sum())

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """How far each layer has moved: |w - w0| / |w0| over its parameters from the source; fresh layers left out."""
        parameters = named_parameters(self.model)
        out = {}
        for layer, rows in self.plan.by_layer():
            pairs = [(whole(parameters[r.name]).cpu(), self._start[r.name]) for r in rows if r.origin == "source"]
            if pairs:
                moved = sum(float((w.double() - w0.double()).square().sum()) for w, w0 in pairs)
                size = sum(float(w0.double().square().sum()) for _, w0 in pairs)
                out[layer] = (moved / size) ** 0.5 if size else float(moved > 0)
        return out

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
        norms = {canonical(name): norm for name, norm in model.named_modules() if tracks_statistics(norm)}
        names = {id(parameter): name for name, parameter in named_parameters(self.model).items()}
        held = [norm for name, norm in norms.items() if self._holds(name, norm, names)]
        hold_statistics(norms.values(), held, model.training)

    def state_dict(self) -> dict[str, Any]:
        """What brings this adaptation back, beside the model's and the optimizer's own state dicts."""
        return {"start": dict(self._start), "phase": self.phase, "plan": self.plan.model_dump(mode="json")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring back anchors, phase and frozen state, by name.

        Raises:
            PlanError: the state belongs to another plan; the message names the first row that differs.
        """
        try:
            plan, start, phase = Plan(**state["plan"]), state["start"], state["phase"]
        except (KeyError, TypeError, ValidationError) as error:
            raise PlanError(f"this is no state of an adaptation: {error}. Load what state_dict() gave.") from error
        if plan != self.plan:
            ours = {row.name: row for row in self.plan.rows}
            other = next((row.name for row in plan.rows if ours.get(row.name) != row), "the phases")
            raise PlanError(
                f"this state belongs to another plan: {other!r} differs. Load it into an adaptation made "
                "from the same model, source and strategies."
            )
        if {n: t.shape for n, t in start.items()} != {n: t.shape for n, t in self._start.items()}:
            raise PlanError("this state's anchors are not those of this adaptation. Load what state_dict() gave.")
        self._start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in start.items()}
        self._anchors.clear()
        self.start_phase(phase)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": None, "_anchors": {}}

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"

    def _anchor(self, name: str, parameter: Tensor) -> Tensor:
        """Where a parameter started, placed as the parameter is."""
        anchor = self._anchors.get(name)
        if anchor is None or anchor.device != parameter.device:
            anchor = place_like(self._start[name], parameter)
            self._anchors[name] = anchor
        return anchor

    def _holds(self, module: str, norm: nn.Module, names: Mapping[int, str]) -> bool:
        """Whether a norm's statistics stand still: its own parameters are frozen, or else its layer's."""
        own = [names[id(parameter)] for parameter in norm.parameters(recurse=False)]
        if not own:
            layer = layer_of(self.layers, module)
            own = [info.name for info in layer.parameters] if layer else []
        return bool(own) and all(parameter in self._frozen for parameter in own)


def _masks(model: nn.Module) -> set[str]:
    """Buffers that may hold infinities by design: all but running statistics."""
    buffers = {canonical(name) for name, _ in unwrap(model).named_buffers()}
    return {name for name in buffers if not name.endswith(("running_mean", "running_var"))}


def _declared(layers: Sequence[Layer], fresh: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Parameters declared fresh by a glob of parameter or layer names -> the reason."""
    if isinstance(fresh, str):
        raise SpecError(f"fresh must be a list of globs; received the text {fresh!r}. Write fresh=[{fresh!r}].")
    reasons = fresh if isinstance(fresh, Mapping) else dict.fromkeys(fresh, "not asked for")
    inside = {layer.name: [info.name for info in layer.parameters] for layer in layers}
    globs = [glob for glob in reasons if glob not in inside]
    found = inside | select(globs, [name for names in inside.values() for name in names])
    return {name: reason for glob, reason in reasons.items() for name in found[glob]}
