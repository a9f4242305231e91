"""Hugging Face's Trainer, with one class and one argument that are conservtl's."""

import tempfile

import torch
from problem import CLIP, EPOCHS, RATE, STRATEGIES, examples, network, source
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import conservtl as ctl
from conservtl.integrations.transformers import ConservingTrainer


class MyTrainer(ConservingTrainer, Trainer):
    """A Trainer that carries out a plan."""


def collate(rows: list) -> dict:
    points, sides = zip(*rows, strict=True)
    return {"input": torch.stack(points), "labels": torch.stack(sides)}


def loss_of(outputs: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int) -> torch.Tensor:
    """Return the sum over the batch divided by the number of labels in all accumulated batches."""
    return cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch


def main(accumulate: int = 1, size: int = 8) -> ctl.Adaptation:
    adaptation = ctl.adapt(network(), source(), STRATEGIES)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            learning_rate=RATE,
            optim="sgd",
            optim_args="momentum=0.9",
            max_grad_norm=CLIP,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = MyTrainer(
            adaptation=adaptation,
            args=args,
            train_dataset=examples(32, angle=0.6, seed=1),
            data_collator=collate,
            compute_loss_func=loss_of,
        )
        trainer.train()
    return adaptation


if __name__ == "__main__":
    print(main().drift())
