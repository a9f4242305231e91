"""LightningCLI: the callback, its optimizer and its scheduler stand in lightning_cli.yaml; the module knows nothing.

python lightning_cli.py fit --config lightning_cli.yaml
"""

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from problem import STRATEGIES, batches, network, source
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import conservtl as ctl


class Classifier(lightning.LightningModule):
    """A LightningModule as it was written before."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())  # not called: the callback's replaces it

    def train_dataloader(self) -> DataLoader:
        return batches()


def adapt(module: Classifier) -> ctl.Adaptation:
    """Return the adaptation of a module; the configuration names this function."""
    return ctl.adapt(module.model, source(), STRATEGIES)


if __name__ == "__main__":
    LightningCLI(Classifier, save_config_callback=None)
