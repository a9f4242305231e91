"""Fabric: a plain loop, whose model and optimizer Fabric sets up. Its checkpoint holds the adaptation too."""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from problem import CLIP, EPOCHS, RATE, STRATEGIES, batches, network, source
from torch.nn.functional import cross_entropy

import conservtl as ctl


def main(folder: Path | None = None) -> ctl.Adaptation:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    adaptation = ctl.adapt(model, source(), STRATEGIES)
    model, optimizer = fabric.setup(model, adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9))
    loader = fabric.setup_dataloaders(batches())
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in loader:
            fabric.backward(cross_entropy(model(inputs), labels))
            adaptation.pull()
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
    if folder is not None:
        fabric.save(folder / "last.ckpt", {"model": model, "optimizer": optimizer, "adaptation": adaptation})
    print(adaptation.drift())
    return adaptation


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
