"""A callback for a plain Trainer, for plans that need nothing before the clipping or in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.integrations.transformers.phases import PhaseCallback
from conservtl.integrations.transformers.state import load_adaptation, save_adaptation
from conservtl.layers import unwrap
from conservtl.plan.update import Update

__all__ = ["ConservingCallback"]

_INSTEAD = "Use ConservingTrainer"


class ConservingCallback(PhaseCallback):
    """Carry out a plan in a ``Trainer`` of any class that gets the adaptation's optimizer.

    ``Trainer(model=adaptation.model, optimizers=(adaptation.optimizer(torch.optim.AdamW, lr=1e-4), None),
    callbacks=[ConservingCallback(adaptation)], ...)``. The optimizer holds the groups, and its step the pull and the
    updates; the callback begins phases at their epochs and keeps the adaptation's state in checkpoints.

    That is exact without clipping (``max_grad_norm=0``), and with it for plans that add nothing to the gradients:
    rates, freezing, phases, decoupled pulls. A Trainer calls back after it has clipped, and never in its loss, so three
    things are refused, which ``ConservingTrainer`` does: a coupled pull beside clipping, terms on outputs and features,
    and work after training.

    Args:
        adaptation: the model that is trained, with its plan.

    Raises:
        SpecError: when training begins: the optimizer or the model is not the adaptation's, or the plan needs
            ``ConservingTrainer``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the Trainer, and restore the adaptation's state if training goes on from a checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        plan, hook = self.adaptation.plan, self.adaptation.bound.hook
        optimizer = kwargs["optimizer"]
        if hook is None or getattr(optimizer, "optimizer", optimizer) is not hook.optimizer:
            raise SpecError(
                "ConservingCallback: the Trainer's optimizer must be the adaptation's, which has the plan's groups and "
                "pull. Pass optimizers=(adaptation.optimizer(torch.optim.AdamW, lr=...), None)."
            )
        if unwrap(kwargs["model"]) is not unwrap(self.adaptation.model):
            raise SpecError(
                "ConservingCallback: the Trainer must train the model that was adapted: model=adaptation.model."
            )
        late = [penalty.by for penalty in plan.penalties if penalty.mode == "coupled"]
        late += [update.by for update in plan.updates if type(update).gradients is not Update.gradients]
        if late and args.max_grad_norm:
            raise SpecError(
                f"ConservingCallback: {late[0]} adds to the gradients, but the Trainer calls back after it has clipped "
                f"them (max_grad_norm is {args.max_grad_norm:g}). {_INSTEAD}, or set max_grad_norm=0."
            )
        if plan.terms:
            raise SpecError(
                f"ConservingCallback: {plan.terms[0].by} adds a term to the loss, which no callback sees. {_INSTEAD}."
            )
        if plan.after:
            raise SpecError(
                f"ConservingCallback: {plan.after[0].by} acts after training, on data that no callback has. {_INSTEAD}."
            )
        if state.global_step:
            load_adaptation(self.adaptation, _folder(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the adaptation's state in the checkpoint."""
        save_adaptation(self.adaptation, _folder(args, state), write=args.should_save)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
