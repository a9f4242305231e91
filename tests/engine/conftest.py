"""Small models and data, and a hand-written training loop as the reference for the engine."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import conservtl as ctl


class Net(nn.Module):
    """A convolution with batch norm, dropout and a head, on (N, 3, 12)."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(self.stem(inputs)).mean(-1)))


def _hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[], Iterable[Any]],
    epochs: int,
    accumulate: int = 1,
) -> None:
    for _ in range(epochs):
        model.train()
        batches = list(epoch()) if accumulate > 1 else epoch()
        if accumulate == 1:
            for inputs, labels in batches:
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            continue
        for start in range(0, len(batches), accumulate):
            group = batches[start : start + accumulate]
            for inputs, labels in group:
                (F.cross_entropy(model(inputs), labels) / len(group)).backward()
            optimizer.step()
            optimizer.zero_grad()


def _same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Use one thread: tensors this small are slower on two, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a DataLoader and its workers look twice a second whether the other is there, not every five seconds."""
    for module in ("torch.utils.data._utils", "torch.utils.data._utils.worker"):
        monkeypatch.setattr(f"{module}.MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,)
    )


@pytest.fixture
def net() -> Callable[..., nn.Module]:
    """Return a function that makes a network; the same seed gives the same weights."""

    def make(seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        return Net(**options)

    return make


@pytest.fixture
def plain(net: Callable[..., nn.Module]) -> Callable[..., ctl.Adaptation]:
    """Return a function that adapts such a network from one with other weights."""

    def make(*strategies: ctl.Strategy, seed: int = 0, **options: Any) -> ctl.Adaptation:
        return ctl.adapt(net(seed, **options), net(100 + seed, **options), strategies)

    return make


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """50 examples: three batches of 16 and a short one of 2."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(50, 3, 12, generator=generator), torch.randint(0, 4, (50,), generator=generator)


@pytest.fixture
def hand() -> Callable[..., None]:
    """The hand-written training loop."""
    return _hand


@pytest.fixture
def same() -> Callable[[nn.Module, nn.Module], bool]:
    """Return a function that compares two models bit for bit, buffers included."""
    return _same


@pytest.fixture
def clone() -> Callable[[ctl.Adaptation], ctl.Adaptation]:
    """Return a function that deep-copies an adaptation with its model."""
    return copy.deepcopy


@pytest.fixture
def interrupting() -> Callable[[int], Callable[[nn.Module, Any], Any]]:
    """Return a function that makes a forward which presses Ctrl-C in its n-th training call."""

    def make(at: int) -> Callable[[nn.Module, Any], Any]:
        calls = 0

        def forward(model: nn.Module, batch: Any) -> Any:
            nonlocal calls
            calls += model.training
            if calls == at and model.training:
                signal.raise_signal(signal.SIGINT)
            return model(batch[0])

        return forward

    return make
