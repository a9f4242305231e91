"""Accelerate: model, optimizer and data are prepared, the adaptation is registered for its checkpoints."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from problem import CLIP, EPOCHS, RATE, STRATEGIES, batches, network, source
from torch.nn.functional import cross_entropy

import conservtl as ctl


def main(folder: Path | None = None, accumulate: int = 1) -> ctl.Adaptation:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    adaptation = ctl.adapt(model, source(), STRATEGIES)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    accelerator.register_for_checkpointing(adaptation)
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(inputs), labels))
                if accelerator.sync_gradients:
                    adaptation.pull(accelerator.scaler)  # unscales in fp16
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    if folder is not None:
        accelerator.save_state(folder)
    accelerator.print(adaptation.drift())
    return adaptation


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
