"""The share of a batch in a step of a Trainer, whose losses are divided in one of two ways.

A Trainer accumulates the gradients of several batches for a step. If the model takes ``num_items_in_batch``, the number
of labels of them all, its loss is the sum over the batch divided by that number: the losses add up to the mean. If
not, each loss is the batch's mean, and the Trainer divides it by the number of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.integrations.transformers.phases import transformers
from conservtl.runtime.preserve import eval_mode

__all__ = ["count_next_tokens", "divides_by_items", "share_of_step"]

_SHIFTS = "_loss_shifts_labels"
"""Attribute of a Trainer that says whether it counts labels from the second on; it has no public name."""


def count_next_tokens(trainer: Any) -> None:
    """Let a Trainer count the labels of a causal language model without the first of each row, which no loss takes.

    It knows such models by a name, which some lack (GPT-2), and divides their loss by more labels than it sums over.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    inner = getattr(model, "get_base_model", None)  # of an adapter's model
    model = inner() if callable(inner) else model
    auto = transformers.models.auto.modeling_auto
    causal = type(model).__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if causal and hasattr(trainer, _SHIFTS):
        vars(trainer)[_SHIFTS] |= model.loss_function is transformers.loss.loss_utils.ForCausalLMLoss


def share_of_step(trainer: Any, inputs: Mapping[str, Any], items: Any) -> float | Tensor:
    """Return the factor that turns a mean over the batch into its part of the step's."""
    custom = trainer.compute_loss_func is not None
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or custom
    if not scaled:
        return 1.0  # the Trainer divides the whole loss by the number of batches
    own = _count(trainer, inputs)
    if items is None or own is None:
        batches: int = trainer.current_gradient_accumulation_steps
        return 1.0 / batches
    share: Tensor = own / items
    if trainer.args.average_tokens_across_devices and (trainer.model_accepts_loss_kwargs or custom):
        # The items are those of all processes, and gradients are averaged over processes.
        share = share * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return share


def _count(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the number of labels of a batch as the Trainer counts them; None if it cannot."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and getattr(trainer, _SHIFTS, False):
            labels = labels[..., 1:]  # the first token is predicted from none
    return labels.ne(-100).sum() if isinstance(labels, Tensor) else None


@torch.no_grad()
def divides_by_items(model: nn.Module, inputs: Mapping[str, Any], items: Any) -> bool | None:
    """Return whether a model divides its loss by ``num_items_in_batch``; None if this batch does not show it.

    Many models take any keyword and leave this one unread: their loss is the batch's mean whatever it says, and a
    Trainer that relies on it adds up as many means as there are batches in a step.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with eval_mode(model), torch.random.fork_rng(devices):
        once, twice = (_loss(model(**inputs, num_items_in_batch=items * factor)) for factor in (1, 2))
    if not isinstance(once, Tensor) or not bool(once.isfinite()) or not bool(once):
        return None
    return not torch.allclose(once, twice, rtol=1e-3)


def _loss(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
