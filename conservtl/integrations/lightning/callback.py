"""The callback: groups, phases, pull and terms of a plan in a Trainer's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.integrations._passes import outermost, recording
from conservtl.integrations.lightning.checks import PACKAGES, check_callbacks, check_schedulers
from conservtl.integrations.lightning.given import class_and_options, find_adaptation, phases_of
from conservtl.runtime.freezing import held_norms, tracks_statistics

__all__ = ["Conserve"]


_Callback: Any = type("_Callback", tuple(package.Callback for package in PACKAGES), {})
_NORMS, _INTERVALS = ("train", "eval"), ("epoch", "step")


class Conserve(_Callback):  # type: ignore[misc]
    """Carry out an adaptation's plan in a ``lightning.Trainer``, or in that of ``pytorch_lightning``.

    The callback begins each phase at the start of its epoch, adds the pull before the Trainer clips, adds the plan's
    terms to the loss that ``training_step`` returns, keeps held norms in eval mode, restores plain weights (Mixout)
    before validation, and saves the adaptation's state in every checkpoint. With the same batches, SGD, accumulation
    and clipping the weights are those of ``ctl.fit``.

    The optimizer must be the adaptation's. Either ``configure_optimizers`` returns it,
    ``return self.adaptation.optimizer(torch.optim.AdamW, lr=1e-3)``; or the callback makes it from ``optimizer``, and
    ``configure_optimizers``, which Lightning wants defined, is not called.

    If a strategy adds a term to the loss, ``training_step`` must call the model once; or it calls
    ``adaptation.loss(...)`` itself, and the callback adds nothing. With manual optimization, call ``adaptation.loss``
    before ``manual_backward`` and ``adaptation.pull()`` before you clip. Measurements are made before ``fit``, with
    ``adaptation.measure``, and the work after training with ``adaptation.finish``.

    Args:
        adaptation: result of ``adapt`` on the LightningModule or on a module inside; or a function that takes the
            LightningModule and returns one; None: the LightningModule's attribute ``adaptation``.
        optimizer: replaces ``configure_optimizers``: a class, or a ``functools.partial`` of one with its arguments,
            such as ``partial(torch.optim.AdamW, lr=1e-3)``; None: ``configure_optimizers`` makes it.
        scheduler: a scheduler class of torch, a ``functools.partial`` of one, or a function of the optimizer, for
            ``adaptation.scheduler``, which keeps the plan's ratios; only with ``optimizer``.
        interval: whether the scheduler steps after each ``"epoch"`` or each ``"step"``.
        batch_norm: statistics of trained batch norms: ``"train"`` updates them on the target, ``"eval"`` keeps the
            source's.
        name: distinguishes several of these callbacks in one Trainer.

    Raises:
        MissingExtraError: on import of this module, if Lightning is not installed.
        SpecError: before training: the optimizer is not the adaptation's, the LightningModule does not contain the
            adaptation's model, the phases do not fit ``max_epochs``, a scheduler would undo their rates, or a
            finetuning callback of Lightning freezes layers too.

    Example:
        >>> import lightning, torch, conservtl as ctl
        >>> from conservtl.integrations.lightning import Conserve
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(4, 2)
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return self.adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> module = Classifier()
        >>> module.adaptation = ctl.adapt(module.model, torch.nn.Linear(4, 2), [ctl.L2SP(alpha=0.1)])
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[Conserve()], accelerator="cpu", barebones=True)
    """

    def __init__(
        self,
        adaptation: Callable[[nn.Module], Adaptation] | Adaptation | None = None,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        batch_norm: Literal["train", "eval"] = "train",
        name: str = "",
    ) -> None:
        super().__init__()
        for field, value, allowed in (("batch_norm", batch_norm, _NORMS), ("interval", interval, _INTERVALS)):
            if value not in allowed:
                raise SpecError(f"Conserve: {field} must be {' or '.join(map(repr, allowed))}; received {value!r}.")
        if scheduler is not None and optimizer is None:
            raise SpecError(
                "Conserve: a scheduler is made for the optimizer that the callback makes, and there is none. Pass "
                "optimizer=..., or return the scheduler from configure_optimizers."
            )
        self._given = adaptation
        self._optimizer, self._scheduler, self._interval = optimizer, scheduler, interval
        self._batch_norm, self._name = batch_norm, name
        self._adaptation: Adaptation | None = adaptation if isinstance(adaptation, Adaptation) else None
        self._phases: list[int] = []
        self._replaced: list[tuple[nn.Module, str, Any]] = []

    @property
    def adaptation(self) -> Adaptation:
        """The adaptation; known from the beginning of ``fit`` if the LightningModule has or makes it.

        Raises:
            SpecError: it is not known yet.
        """
        if self._adaptation is None:
            raise SpecError("Conserve finds the adaptation when trainer.fit(module) begins. Call fit first.")
        return self._adaptation

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        key: str = self._generate_state_key(name=self._name)
        return key

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptation's state: plan, anchors, phase, measurements, updates."""
        return {} if self._adaptation is None else self._adaptation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the adaptation's state, which must be of the same plan, before the optimizer is made."""
        if state_dict:
            self.adaptation.load_state_dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the adaptation, check it against the Trainer, and freeze before a strategy wraps the model."""
        self._adaptation = find_adaptation(self._given, pl_module, known=self._adaptation)
        if stage != "fit":
            return
        check_callbacks(trainer)
        self._phases = phases_of(self._adaptation.plan, trainer.max_epochs)
        self._adaptation.keep_frozen()
        if self._optimizer is not None:
            self._replace(pl_module, "configure_optimizers", self._configure_optimizers)
        if self._adaptation.plan.terms and pl_module.automatic_optimization:
            self._replace(pl_module, "training_step", self._with_terms(pl_module))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the optimizer is the adaptation's, and that schedulers keep the rates of phases."""
        hook = self.adaptation.bound.hook
        if hook is None or all(optimizer is not hook.optimizer for optimizer in trainer.optimizers):
            found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise SpecError(
                f"Conserve: the optimizer must be the adaptation's, which has the plan's rates and pull; "
                f"{type(pl_module).__name__}.configure_optimizers made another ({found}). Return "
                "self.adaptation.optimizer(torch.optim.AdamW, lr=...) there, or pass Conserve(adaptation, "
                "optimizer=partial(torch.optim.AdamW, lr=...))."
            )
        check_schedulers(trainer, self.adaptation)
        # The Trainer warns of modules in eval mode; those of the plan return to it when training starts.
        for norm in held_norms(self.adaptation.model):
            norm.training = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the phase of a run that goes on within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - Lightning's signature
        """Begin the epoch's phase, and put norms into the mode that the plan and ``batch_norm`` say."""
        phase = self._phases[min(trainer.current_epoch, len(self._phases) - 1)]
        if phase != self.adaptation.phase:
            self.adaptation.start_phase(phase)
        self.adaptation.keep_frozen()
        for module in self.adaptation.model.modules() if self._batch_norm == "eval" else ():
            if tracks_statistics(module):
                module.eval()

    def on_train_batch_start(self, *_: Any) -> None:
        """Mix weights (Mixout) whichever part of the model the training step calls."""
        self.adaptation.bound.before_forward(training=True)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002
        """Add the pull to the complete, unscaled gradients, before the Trainer clips them."""
        hook = self.adaptation.bound.hook
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unscales_itself = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        if hook is not None and optimizer is hook.optimizer and not unscales_itself:  # that one cannot be clipped
            self.adaptation.pull(scaler)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Restore plain weights: an evaluation may call a part of the model, which announces nothing."""
        self.adaptation.restore_weights()

    on_test_start = on_predict_start = on_train_end = on_validation_start

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Leave the LightningModule as it was."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Leave the LightningModule as it was."""
        while self._replaced:
            module, name, before = self._replaced.pop()
            module.__dict__.pop(name, None)
            if before is not None:
                module.__dict__[name] = before

    def _configure_optimizers(self) -> Any:
        cls, options = class_and_options(self._optimizer)
        optimizer = self.adaptation.optimizer(cls, **options)
        if self._scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.adaptation.scheduler(self._scheduler), "interval": self._interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _with_terms(self, pl_module: Any) -> Callable[..., Any]:
        """Return the training step with the plan's terms added to its loss, unless it adds them itself."""
        original = pl_module.training_step
        model = outermost(pl_module, self.adaptation.model) or self.adaptation.model
        terms = self.adaptation.bound.terms

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            before = terms.added
            with recording(model) as passes:
                output = original(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if terms.added != before or not isinstance(loss, Tensor):
                return output
            if len(passes) != 1:
                raise SpecError(
                    f"{terms.terms[0].by} compares the outputs of one forward pass; training_step made {len(passes)} "
                    f"of {type(model).__name__}. Call it once, or call loss = self.adaptation.loss(loss, outputs, "
                    "inputs) in training_step."
                )
            batch = args[0] if args else kwargs.get("batch")
            total = self.adaptation.loss(loss, passes[0].outputs, passes[0].inputs, batch=batch)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        return training_step

    def _replace(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        self._replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = method
