"""The problem of every script here: a small network that knows one domain, and a few examples of another."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl

STRATEGIES = (ctl.L2SP(alpha=0.1), ctl.DiscriminativeLR(decay=0.8))
EPOCHS, RATE, CLIP = 4, 0.1, 0.5


def network() -> nn.Module:
    """Return an untrained network: two inputs, two classes."""
    return nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def examples(count: int, angle: float, seed: int) -> TensorDataset:
    """Return points of the plane and the side of a line on which each lies.

    Args:
        count: number of points.
        angle: direction of the line, in radians; another angle is another domain.
        seed: of the points.
    """
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    normal = torch.tensor([angle, angle]).add(torch.tensor([torch.pi / 2, 0.0])).sin()
    return TensorDataset(points, (points @ normal > 0).long())


def source() -> nn.Module:
    """Return the network trained on the source domain."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    points, sides = examples(256, angle=0.0, seed=0).tensors
    for _ in range(30):
        cross_entropy(model(points), sides).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batches() -> DataLoader:
    """Return the target's examples, in four batches that are the same in every epoch."""
    return DataLoader(examples(32, angle=0.6, seed=1), batch_size=8)


def accuracy(model: nn.Module, angle: float) -> float:
    """Return the accuracy on 1,000 new points of a domain, in per cent."""
    model.eval()
    points, sides = examples(1000, angle, seed=2).tensors
    with torch.no_grad():
        return 100 * (model(points).argmax(1) == sides).float().mean().item()
