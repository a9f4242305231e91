"""A compact Conformer trained by CTC on utterances of different lengths, by several loops on the same batches."""

from __future__ import annotations

from typing import Any

import torch
import trainers
from engine_measuring import Problem
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

import conservtl as ctl
from conservtl.data import Sequences
from conservtl.engine.buckets import BucketedBatches
from conservtl.layers.copying import deep_copy
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.recognizers import CTC

UTTERANCES, BANDS, TOKENS, HOP, LR = 96, 40, 30, 0.01, 1e-4
SECONDS, LONGEST = 24.0, 4.0  # of a batch with padding; of an utterance
SAME_DECAY = ctl.DiscriminativeLR(groups={"*": 1.0}, decay_biases_and_norms=True)  # one group, as in the other loops


def utterances() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    seconds = (1 + (LONGEST - 1) * torch.rand(UTTERANCES, generator=generator)).tolist()
    frames = [int(each / HOP) for each in seconds]
    return Sequences(
        tuple(torch.randn(count, BANDS, generator=generator) for count in frames),
        tuple(torch.randint(1, TOKENS, (count // 16,), generator=generator) for count in frames),
        tuple(map(str, range(UTTERANCES))),
        (),
        tuple(seconds),
    )


DATA = utterances()
BATCHES = BucketedBatches(DATA, UTTERANCES, SECONDS, shuffle=True)


def conformer() -> nn.Module:
    return ConformerCTC(BANDS, TOKENS, ConformerArgs())


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    logits, lengths = model(batch["inputs"], batch["lengths"])
    labels = batch["labels"]
    scores = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, labels.clamp_min(0), lengths, (labels >= 0).sum(1))


def by_hand(model: nn.Module, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model.train()
    for _ in range(epochs):
        for batch in BATCHES:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def forward(model: nn.Module, batch: Any) -> Any:
    return model(batch["inputs"], batch["lengths"])


def fit(model: nn.Module, epochs: int, *strategies: Any) -> None:
    adaptation = ctl.adapt(model, deep_copy(model), [SAME_DECAY, *strategies])
    training = ctl.Training(
        epochs=epochs, batch_size=UTTERANCES, batch_seconds=SECONDS, lr=LR, device="cpu", precision="fp32"
    )
    ctl.fit(adaptation, DATA, training=training, forward=forward, loss=CTC().loss)


def fit_pull(model: nn.Module, epochs: int) -> None:
    fit(model, epochs, ctl.L2SP(alpha=0.01))


def loader() -> DataLoader[Any]:
    """Return a loader of the batches, cut once; in an order drawn each epoch."""
    tensors = [{key: value for key, value in batch.items() if key != "names"} for batch in BATCHES]
    return DataLoader(tensors, batch_size=None, shuffle=True)  # type: ignore[arg-type]


def lightning_trainer(model: nn.Module, epochs: int) -> None:
    trainers.lightning_trainer(model, loss_of, loader(), epochs, LR)


def transformers_trainer(model: nn.Module, epochs: int) -> None:
    trainers.transformers_trainer(model, loss_of, list(BATCHES), epochs, LR, batches=loader())


BY_HAND, TRAINER = "loop by hand", "Hugging Face Trainer"
PROBLEM = Problem(
    make=conformer,
    variants={
        BY_HAND: (by_hand, None),
        "fit": (fit, None),
        "fit, L2-SP": (fit_pull, None),
        "Lightning Trainer": (lightning_trainer, "lightning"),
        TRAINER: (transformers_trainer, "transformers"),
    },
    base=BY_HAND,
    ratios=[("fit", BY_HAND, 0.98), ("fit", TRAINER, 1.0), ("fit, L2-SP", BY_HAND, None)],
    steps=len(BATCHES),
    method=f"{UTTERANCES} utterances of 1 to {LONGEST:g} s in {len(BATCHES)} batches of similar length, at most "
    f"{SECONDS:g} s with padding; CTC.",
)
