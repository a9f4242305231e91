"""Trainers of other libraries with AdamW at a constant rate, without logs and checkpoints."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

__all__ = ["Named", "lightning_trainer", "loss_of_named", "loss_of_pair", "transformers_trainer"]

Loss = Callable[[nn.Module, Any], Tensor]
"""Of a model and a batch."""


def loss_of_pair(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loss_of_named(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"])


class Named(Dataset[dict[str, Tensor]]):
    """Examples under the names that the Trainer hands to a model."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return an example."""
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


def lightning_trainer(
    model: nn.Module, loss: Loss, batches: DataLoader[Any], epochs: int, lr: float, *, cuda: bool = False
) -> None:
    import lightning  # noqa: PLC0415 - may be missing

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=lr)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shown = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "gpu", "precision": "bf16-mixed"} if cuda else {"accelerator": "cpu"}
    lightning.Trainer(max_epochs=epochs, devices=1, logger=False, **place, **shown).fit(Module(), batches)


def transformers_trainer(
    model: nn.Module, loss: Loss, examples: Any, epochs: int, lr: float, *, batch: int | None = None,
    batches: DataLoader[Any] | None = None, cuda: bool = False,
) -> None:  # fmt: skip
    """Train on batches of so many examples, which the Trainer makes, or on the given ones."""
    import transformers  # noqa: PLC0415 - may be missing

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
            return {"loss": loss(self.model, {"inputs": inputs, "labels": labels, "lengths": lengths})}

    class OnBatches(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return super().get_train_dataloader() if batches is None else batches

    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    adamw = {"optim": "adamw_torch", "learning_rate": lr, "weight_decay": 0.01, "max_grad_norm": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=batch or 8, lr_scheduler_type="constant",
            use_cpu=not cuda, bf16=cuda, **adamw, **quiet,
        )  # fmt: skip
        trainer = OnBatches(Module(), arguments, train_dataset=examples)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
