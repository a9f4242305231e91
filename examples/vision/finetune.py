"""Fine-tune an image classifier for new labels, in a training loop by hand.

python finetune.py                scikit-learn's digits: five classes are the source, the other five the target
python finetune.py ROOT WEIGHTS   an ImageFolder with train/ and test/, and CIFAR ResNet-20 weights
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import conservtl as ctl
from conservtl.data import Examples
from conservtl.tasks import vision


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the accuracy in per cent."""
    model.eval()
    with torch.no_grad():
        return 100 * (model(examples.inputs).argmax(1) == examples.labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    network = vision.ModelSpec(name="cifar_resnet20")
    folder = len(sys.argv) > 2
    section = vision.ImageFolderData(root=Path(sys.argv[1]), shots=25) if folder else vision.DigitsData()
    data = vision.load(section, model=network, seed=0)

    source: str | nn.Module = sys.argv[2] if folder else vision.build(network, data.preprocessing, 5)
    if isinstance(source, nn.Module):  # no weights: train the source on its five digits
        settings = ctl.Training(epochs=8, lr=3e-3, schedule="one_cycle", evaluate_every=1000)
        ctl.fit(ctl.adapt(source, ctl.itself(missing=[])), data.source_train, training=settings, progress=True)

    # The adaptation: the input side is held, and the new head learns fastest.
    model = vision.build(network, data.preprocessing, len(data.labels))
    adaptation = ctl.adapt(
        model,
        source,
        [ctl.LayerTransfer(side="input", layers=4), ctl.L2SP(), ctl.DiscriminativeLR(decay=0.8)],
        example=data.shots.inputs[:2],
        fresh=["linear"],  # the target has other labels
    )
    print(adaptation.plan)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=3e-3)
    for _ in range(60):
        model.train()
        cross_entropy(model(data.shots.inputs), data.shots.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"target accuracy {accuracy(model, data.target_test):.1f} %; penalty {adaptation.penalty().item():.3f}")


if __name__ == "__main__":
    main()
