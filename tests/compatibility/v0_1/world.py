"""The networks, data and loops that the files here were made with; the test makes them again. Never change it.

It knows torch alone, and of conservtl only what is handed to it.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF = 4  # steps by hand before the checkpoint, and after it
SEED = 3  # of fit
STOP = 5  # the training batch of fit in which Ctrl-C is pressed
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


class Conv(nn.Module):
    """Two convolutions with batch norm, two linear maps and a head, on (N, 2, 5, 5)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.body(self.stem(inputs)).mean((2, 3))).tanh()).tanh())


class Recurrent(nn.Module):
    """An LSTM and a head, on (N, 4, 3)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs)[0].mean(1))


class Small(nn.Module):
    """A convolution with batch norm, a linear map and a head, on (N, 2, 6); what is trained."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU())
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(self.stem(inputs).mean(-1)).tanh())


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "conv": (Conv, (2, 2, 5, 5)),
    "recurrent": (Recurrent, (2, 4, 3)),
    "small": (Small, (2, 2, 6)),
}
"""Name -> its class, and the shape of an input."""


def network(name: str, classes: int) -> tuple[nn.Module, Tensor]:
    """A network in float64, and an input for it; no generator takes part, but for the initial values."""
    make, shape = NETWORKS[name]
    model = make(classes).double()
    _fill(model, 1.0)
    return model, waves(shape, 0.5)


def source(name: str) -> dict[str, Tensor]:
    """Source weights of a network with three outputs."""
    model = NETWORKS[name][0](3).double()
    _fill(model, 2.0)
    return model.state_dict()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Eight batches of (inputs, labels) for the small network with three outputs."""
    return [(waves((6, 2, 6), 1.0 + number), (torch.arange(6) * (number + 1)) % 3) for number in range(2 * HALF)]


def data() -> tuple[Tensor, Tensor]:
    """The same as one set of examples."""
    inputs, labels = zip(*batches(), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def train(
    adaptation: Any, optimizer: torch.optim.Optimizer, given: Iterable[tuple[Tensor, Tensor]], first: int = 0
) -> None:
    """A loop by hand, whose every second step begins the next phase where there is one."""
    adaptation.model.train()
    last = len(adaptation.plan.phases) - 1
    for step, (inputs, labels) in enumerate(given, start=first):
        if step % 2 == 0 and min(step // 2, last) != adaptation.phase:
            adaptation.start_phase(min(step // 2, last))
        optimizer.zero_grad()
        outputs = adaptation.model(inputs)
        adaptation.loss(F.cross_entropy(outputs, labels), outputs, inputs).backward()
        optimizer.step()


def interrupting(model: nn.Module, batch: Any) -> Tensor:
    """A forward pass of fit that presses Ctrl-C in one training batch."""
    if model.training:
        interrupting.calls += 1
        if interrupting.calls == STOP:
            signal.raise_signal(signal.SIGINT)
    return model(batch[0])


interrupting.calls = 0


def waves(shape: tuple[int, ...], speed: float) -> Tensor:
    """Numbers between -1 and 1, float64, without a generator."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * speed + speed).sin().reshape(shape)


@torch.no_grad()
def _fill(model: nn.Module, speed: float) -> None:
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        values = waves(tuple(tensor.shape), speed + 0.1 * number)
        positive = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
        tensor.copy_(1 + values / 2 if positive else values)
