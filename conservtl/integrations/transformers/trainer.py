"""A mixin for Hugging Face's ``Trainer`` and ``Seq2SeqTrainer`` that carries out a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.integrations.transformers.accumulation import count_next_tokens, divides_by_items, share_of_step
from conservtl.integrations.transformers.checks import check_class, check_trainer
from conservtl.integrations.transformers.optimizer import optimizer_class
from conservtl.integrations.transformers.phases import PhaseCallback, transformers
from conservtl.integrations.transformers.state import load_adaptation, save_adaptation

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["ConservingTrainer"]


class ConservingTrainer(_Trainer):  # type: ignore[misc]
    """Carry out an adaptation's plan in a ``Trainer``; a mixin, which stands before it.

    - The optimizer that ``TrainingArguments`` names gets the plan's groups and rates (multiples of ``learning_rate``);
      ``weight_decay`` acts as in a plain Trainer, and is refused where a penalty covers the weights.
    - The pull is added to complete, unscaled gradients before they are clipped (``max_grad_norm`` is 1.0 by default),
      as a term in the loss would be. The logged loss is without it.
    - Terms on outputs and features are added in ``compute_loss`` with the batch's share of the step, so that
      accumulated batches give the gradients of one batch of all their examples. Evaluation shows the task's loss alone.
    - A model that takes ``num_items_in_batch`` and leaves it unread, as BERT's classifiers do, is found out on its
      first batch, and its loss divided by the number of accumulated batches.
    - Phases begin at their epochs, in the scheduler's rates too. Checkpoints hold the adaptation's state beside the
      optimizer's (``conservtl.pt``), and training goes on from them to the same weights.
    - Measurements on the target are made on the training data before the optimizer, unless you have made them, and
      the work after training (interpolation, ...) at the end of ``train``; ``finished`` holds its facts.

    The arguments are not changed.

    Args:
        adaptation: the model that is trained, with its plan; ``model`` may be left out.
        args: as for the Trainer.
        kwargs: as for the Trainer.

    Raises:
        MissingExtraError: on import of this module, if transformers is not installed.
        SpecError: before training: ``model``, ``model_init`` or ``optimizers`` contradict the adaptation, the phases
            do not fit the epochs, or the plan cannot be carried out with these arguments (DeepSpeed, FSDP version 1,
            several GPUs in one process).

    Example:
        >>> import torch, transformers, conservtl as ctl
        >>> from conservtl.integrations.transformers import ConservingTrainer
        >>> class Trainer(ConservingTrainer, transformers.Trainer):
        ...     pass
        >>> config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> source, model = (transformers.GPT2LMHeadModel(config) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
        >>> texts = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
        >>> args = transformers.TrainingArguments("/tmp/trainer", max_steps=2, report_to=[], disable_tqdm=True)
        >>> trainer = Trainer(adaptation=adaptation, args=args, train_dataset=texts)
    """

    optimizer: Any
    loss_is_scaled_for_ga: bool | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, ConservingTrainer)

    def __init__(self, *args: Any, adaptation: Adaptation, **kwargs: Any) -> None:
        check_class(type(self), ConservingTrainer, complete=True)
        self.adaptation = adaptation
        self.finished: dict[str, Any] = {}
        """Facts of the work after training: name of each decision -> its facts."""
        self._divides: bool | None = None
        if not args and kwargs.get("model") is None and kwargs.get("model_init") is None:
            kwargs["model"] = getattr(adaptation, "model", None)
        super().__init__(*args, **kwargs)
        check_trainer(self, adaptation)
        count_next_tokens(self)
        self.add_callback(PhaseCallback(adaptation))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:  # noqa: ARG002 - as in Trainer
        """Make the optimizer that the arguments name, with the plan's groups, and the measurements that are missing."""
        if self.optimizer is None:
            if any(measure.data == "target" for measure in self.adaptation.bound.unmeasured()):
                self.adaptation.measure(
                    self._batches(), forward=_outputs, loss=self._task_loss, autocast=self.accelerator.autocast
                )
            cls, options = optimizer_class(self)
            self.optimizer = self.adaptation.optimizer(cls, **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint's state if one is given, and carry out what the plan does after training."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)
        if isinstance(checkpoint, (str, Path)):
            load_adaptation(self.adaptation, checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.adaptation.plan.after:
            valid = _Batches(self.get_eval_dataloader, self._prepare_inputs) if self.eval_dataset is not None else None
            self.finished = self.adaptation.finish(
                self._batches(),
                forward=_outputs,
                score=partial(_score, self) if valid is not None else None,
                valid=valid,
                objective=self.compute_loss,
            )
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the task's loss, with the plan's terms in training; arguments as for the Trainer."""
        given = dict(inputs)  # the Trainer takes the labels out if it smooths them
        if num_items_in_batch is not None and self._leaves_items_unread(model, given, num_items_in_batch):
            num_items_in_batch = None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.is_in_train and torch.is_grad_enabled() and self.adaptation.plan.terms:
            share = share_of_step(self, given, num_items_in_batch)
            bare = outputs[1:] if isinstance(outputs, tuple) and "labels" in inputs else outputs  # (loss, logits, ...)
            with self.accelerator.autocast():
                source = self.adaptation.bound.source_view(given, outputs=bare)
            loss = self.adaptation.loss(loss, bare, given, source=source, batch=given, share=share)
        return (loss, outputs) if return_outputs else loss

    def _leaves_items_unread(self, model: nn.Module, inputs: Mapping[str, Any], items: Any) -> bool:
        """Return whether the model's own loss ignores ``num_items_in_batch``, and let the Trainer know if so."""
        decided = self.loss_is_scaled_for_ga is not None or self.compute_loss_func is not None
        alone = self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1
        if self._divides is None and not (decided or alone or self.label_smoother is not None):
            self._divides = divides_by_items(model, inputs, items)
            if self._divides is False:
                self.loss_is_scaled_for_ga = False
        return self._divides is False

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Add the pull, then clip."""
        scaler = getattr(self.accelerator, "scaler", None)
        self.adaptation.pull(scaler)
        if scaler is None:
            return super()._clip_grad_norm(model)
        # Accelerate would unscale gradients that the pull has unscaled.
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the adaptation's state whenever the optimizer's is saved."""
        super()._save_optimizer_and_scheduler(output_dir)
        save_adaptation(self.adaptation, output_dir, write=self.args.should_save)

    def _batches(self) -> _Batches:
        return _Batches(self.get_train_dataloader, self._prepare_inputs)

    def _task_loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the task's loss of outputs that were computed with labels."""
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, batch.get("labels"))  # type: ignore[no-any-return]
        return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]  # type: ignore[no-any-return]


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return a model's outputs for its arguments, labels included."""
    return model(**batch)


class _Batches:
    """The batches of a Trainer's data on its device, as often as they are iterated.

    Args:
        loader: () -> DataLoader.
        place: batch -> the batch on the model's device.
    """

    def __init__(self, loader: Callable[[], Iterable[Any]], place: Callable[[Any], Any]) -> None:
        self._loader, self._place = loader, place

    def __iter__(self) -> Iterator[Any]:
        return map(self._place, self._loader())


def _score(trainer: Any) -> float:
    """Return the metric for the best model, as the Trainer's arguments name it, else the loss; higher is better."""
    name = trainer.args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    value = float(trainer.evaluate()[name])
    return value if trainer.args.greater_is_better else -value
