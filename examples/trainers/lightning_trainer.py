"""Lightning: a callback carries out the plan in the Trainer; the optimizer is one line of the module."""

import lightning
import torch
from problem import CLIP, EPOCHS, RATE, STRATEGIES, batches, network, source
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import conservtl as ctl
from conservtl.integrations.lightning import Conserve


class Classifier(lightning.LightningModule):
    """A network with an adaptation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.adaptation = ctl.adapt(model, source(), STRATEGIES)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)


def main() -> ctl.Adaptation:
    module = Classifier(network())
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        callbacks=[Conserve()],
        accelerator="cpu",
        barebones=True,  # no files, logs and bars
    )
    trainer.fit(module, batches())
    print(module.adaptation.drift())
    return module.adaptation


if __name__ == "__main__":
    main()
