"""Adapt a keyword network to one speaker, in a training loop by hand.

python adapt_speaker.py                  synthetic voices, no data needed
python adapt_speaker.py ROOT SPEAKER     recordings under ROOT, such as free spoken digits
"""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import conservtl as ctl
from conservtl.data import Examples
from conservtl.tasks import speech


def accuracy(model: nn.Module, examples: Examples) -> str:
    """Return the accuracy in per cent."""
    model.eval()
    with torch.no_grad():
        return f"{100 * (model(examples.inputs).argmax(1) == examples.labels).float().mean().item():.1f} %"


def main() -> None:
    torch.manual_seed(0)
    folder = len(sys.argv) > 2
    section = speech.FolderData(root=sys.argv[1], target=sys.argv[2]) if folder else speech.EspeakData()
    data = speech.load(section, seed=0)

    # The source model, trained on all other speakers. A file of weights would do as well.
    source = speech.build(speech.ModelSpec(), data.preprocessing, len(data.labels))
    settings = ctl.Training(epochs=15, lr=3e-3, schedule="one_cycle", device="cpu", threads=1)  # a GPU would wait
    ctl.fit(ctl.adapt(source, ctl.itself(missing=[])), data.source_train, training=settings, progress=True)
    print(f"before: target {accuracy(source, data.target_test)}, source {accuracy(source, data.source_test)}")

    # The adaptation: the output side is held, the other layers are pulled toward the source.
    model = speech.build(speech.ModelSpec(), data.preprocessing, len(data.labels))
    adaptation = ctl.adapt(
        model,
        source,
        [ctl.LayerTransfer(side="output", layers=1), ctl.L2SP(mode="decoupled", alpha=30)],
        example=data.shots.inputs[:2],
    )
    print(adaptation.plan)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3)
    model.eval()  # batch norms keep the source's statistics: fifty recordings are too few for new ones
    for _ in range(100):
        cross_entropy(model(data.shots.inputs), data.shots.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"after:  target {accuracy(model, data.target_test)}, source {accuracy(model, data.source_test)}")
    for layer, moved in adaptation.drift().items():
        print(f"{layer:12} moved by {100 * moved:.1f} %")


if __name__ == "__main__":
    main()
