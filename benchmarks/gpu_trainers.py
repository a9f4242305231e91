"""Trainers of other libraries on the problem of ``gpu_engine.py``: in memory, AdamW, batches by a DataLoader."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

__all__ = ["lightning_trainer", "transformers_trainer"]


def lightning_trainer(problem: Any, model: nn.Module) -> None:
    import lightning  # noqa: PLC0415 - may be missing

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=problem.lr)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shown = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=problem.epochs, accelerator="gpu" if problem.place.cuda else "cpu", devices=1, logger=False,
        precision="bf16-mixed" if problem.place.cuda else "32-true", **shown,
    )  # fmt: skip
    trainer.fit(Module(), problem.loader())


def transformers_trainer(problem: Any, model: nn.Module) -> None:
    import transformers  # noqa: PLC0415 - may be missing

    class Items(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(problem.data[0])

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"inputs": problem.data[0][index], "labels": problem.data[1][index]}

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        adamw = {"optim": "adamw_torch", "learning_rate": problem.lr, "weight_decay": 0.01, "max_grad_norm": 0.0}
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=problem.epochs, per_device_train_batch_size=problem.batch,
            lr_scheduler_type="constant", use_cpu=not problem.place.cuda, bf16=problem.place.cuda, **adamw, **quiet,
        )  # fmt: skip
        trainer = transformers.Trainer(Module(), arguments, train_dataset=Items())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
