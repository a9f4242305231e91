"""Methods that a training loop calls: optimizer, scheduler, loss, pull, phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from conservtl.adaptation._base import AdaptationBase
from conservtl.adaptation.origin import optimizer_of, schedule_of
from conservtl.errors import SpecError
from conservtl.functions import Forward
from conservtl.plan.term import View
from conservtl.runtime.extra_groups import add_extra_groups
from conservtl.runtime.rates_over_time import PlanScheduler
from conservtl.runtime.runners import total_penalty

__all__ = ["LoopMethods"]


class LoopMethods(AdaptationBase):
    """Methods of an adaptation that a training loop calls."""

    def optimizer(
        self,
        cls: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        pull: bool = True,
        extra: Any = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Return an optimizer with the plan's rates in its groups and the pull in its step.

        The pull acts before the step, after clipping; call ``pull()`` before you clip to clip it with the task's
        gradients, as a term in the loss would be. Call this after the model has been moved, wrapped or sharded.

        Args:
            cls: any optimizer class that takes groups and dense gradients. None: that of the training settings handed
                to ``adapt`` in a recipe, with its rate.
            pull: whether the step adds the penalties' gradients; False for a loss that contains ``penalty()``.
            extra: parameters outside the model, such as a head in the loss or a temperature: a module, parameters, or
                groups as torch takes them (``{"params": head.parameters(), "lr": 0.1}``). They get groups of their own
                at ``lr``, which phases and ``scheduler`` scale; no strategy acts on them.
            options: passed to ``cls``; ``lr`` is the rate that the plan's ratios multiply.

        Raises:
            SpecError: the optimizer cannot carry out the plan, or a measurement or search must be made first.

        Example:
            >>> import torch, conservtl as ctl
            >>> source, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
            >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
            >>> optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3)
        """
        if cls is None:
            cls, options = optimizer_of(self.training, options)
        optimizer = self.bound.make_optimizer(cls, options, pull=pull)
        if extra is not None:
            scale = self.plan.phases[self.phase].scale
            add_extra_groups(optimizer, extra, self.bound.parameters().values(), scale)
        return optimizer

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
        if self.bound.hook is None:
            raise SpecError("scheduler() sets the rates of adaptation.optimizer(...): make that optimizer first.")
        if cls is None:
            cls, options = schedule_of(self.training, options)
        return PlanScheduler(self.bound.hook.optimizer, cls, args, options)

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
            inputs: the model's inputs in that pass: a tensor, a tuple or list of positional or a dictionary of keyword
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
        if not isinstance(loss, Tensor) or loss.ndim:
            received = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            raise SpecError(f"the loss must be a scalar, the mean over the batch; received {received}. Reduce it.")
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
        return self.bound.objective(loss, outputs, source, inputs if batch is None else batch, share)

    def source_view(self, inputs: Any, forward: Forward | None = None) -> View | None:
        """Return the source model's outputs and tapped features for a batch; None unless a term needs them.

        Args:
            inputs: as the model takes them, or a batch that ``forward`` takes.
            forward: (model, batch) -> outputs; None calls the model with ``inputs``.
        """
        return self.bound.source_view(inputs, forward)

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

    def restore_weights(self) -> None:
        """Restore plain weights if an update (Mixout) replaced them for a forward pass that no step followed.

        Saving or evaluating the model, and the methods here, do this by themselves. Call it before you read the
        weights in another way after a step that a scaler skipped.
        """
        self.bound.restore_weights()
