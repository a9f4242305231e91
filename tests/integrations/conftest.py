"""A small network with a batch norm, and data in batches that are always the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A stem with a batch norm, a body and a head, on (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(self.stem(inputs)))


@pytest.fixture
def net() -> Callable[[int], nn.Module]:
    """Return a function that makes a network; the same seed gives the same weights."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net()

    return make


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """32 examples of three classes."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator)


@pytest.fixture
def batches(data: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    """Four batches of 8, in order."""
    return DataLoader(TensorDataset(*data), 8)
