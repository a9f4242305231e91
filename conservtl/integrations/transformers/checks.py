"""Trainers that cannot carry out a plan, refused before training."""

from __future__ import annotations

from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.integrations.transformers.phases import transformers
from conservtl.layers import unwrap

__all__ = ["check_class", "check_trainer"]

_PRIVATE = ("_clip_grad_norm", "_save_optimizer_and_scheduler")
"""Methods of the Trainer without a public name, which the mixin overrides."""


def check_class(cls: type, mixin: type, *, complete: bool = False) -> None:
    """Raise unless the mixin stands before a Trainer that has the methods it overrides.

    Another mixin may follow it, unless the class is ``complete``.
    """
    trainer = transformers.Trainer
    if not issubclass(cls, trainer):
        if complete:
            raise SpecError(
                f"{cls.__name__} is a mixin for a Trainer, not one itself. Write class MyTrainer(ConservingTrainer, "
                "transformers.Trainer): pass."
            )
        return
    if cls.__mro__.index(trainer) < cls.__mro__.index(mixin):
        raise SpecError(
            f"{cls.__name__}: ConservingTrainer must stand before the Trainer whose methods it extends. Write class "
            f"{cls.__name__}(ConservingTrainer, ...)."
        )
    if missing := [name for name in _PRIVATE if not hasattr(trainer, name)]:
        raise SpecError(
            f"transformers {transformers.__version__}: its Trainer must clip gradients in {missing[0]}, so that the "
            "pull can come before, and does not. Install transformers 5 or newer: pip install "
            "'conservtl[transformers]'."
        )


def check_trainer(trainer: Any, adaptation: Adaptation) -> None:
    """Raise if a new Trainer contradicts the adaptation, or cannot carry out its plan."""
    if not isinstance(adaptation, Adaptation):
        raise SpecError(f"adaptation must be the result of adapt(model, source, ...); received {adaptation!r}.")
    if trainer.model_init is not None:
        raise SpecError(
            "model_init makes a new model for each run, but the adaptation belongs to one. Leave it out, and adapt in "
            "each run."
        )
    if unwrap(trainer.model) is not unwrap(adaptation.model):
        raise SpecError(
            f"model must be the one that was adapted, but the Trainer got another {type(trainer.model).__name__}. "
            "Leave model out."
        )
    if trainer.optimizer is not None:
        raise SpecError(
            "optimizers holds an optimizer of its own, which lacks the plan's groups and pull. Leave it out and set "
            "optim and learning_rate in TrainingArguments, or give a class: optimizer_cls_and_kwargs=(torch.optim.SGD, "
            "{'lr': 0.1})."
        )
    if trainer.is_deepspeed_enabled:
        raise SpecError("deepspeed steps copies of the weights by itself, so the pull is lost. Use DDP or FSDP2.")
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise SpecError("fsdp version 1 flattens parameters, which lose their names. Set fsdp_config={'version': 2}.")
    if trainer.args.n_gpu > 1:
        raise SpecError(
            f"{trainer.args.n_gpu} GPUs in one process run copies of the model, in which terms and updates do not act. "
            "Launch one process for each GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one."
        )
    if scored := [after.by for after in adaptation.plan.after if type(after).scored and trainer.eval_dataset is None]:
        raise SpecError(f"{scored[0]} chooses on a validation part after training: pass eval_dataset.")
