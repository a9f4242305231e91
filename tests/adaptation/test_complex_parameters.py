"""Complex parameters (spectral layers) are trained, pulled and measured as their real and imaginary parts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import conservtl as ctl
from conservtl.kernels.chunks import chunk

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Spectral(nn.Module):
    """A complex weight and bias between real layers."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.before = nn.Linear(4, width, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(width, width, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.complex128))
        self.head = nn.Linear(width, 2, dtype=torch.float64)

    def mixed(self, x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return self.head((self.before(x).to(weight.dtype) @ weight + shift).abs())

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x, self.weight, self.shift)


class Split(Spectral):
    """The same network with the parts as real parameters of one more dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(self.weight.detach()).clone())
        self.shift = nn.Parameter(torch.view_as_real(self.shift.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x, torch.view_as_complex(self.weight), torch.view_as_complex(self.shift))


def twins() -> tuple[Spectral, Split]:
    torch.manual_seed(3)
    whole, split = Spectral(), Split()
    split.load_state_dict({name: parts(t) for name, t in whole.state_dict().items()})
    return whole, split


def parts(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def train(model: nn.Module, strategies: list[ctl.Strategy], options: dict[str, object]) -> ctl.Adaptation:
    source = {name: t + (0.1 + 0.1j if t.is_complex() else 0.1) for name, t in model.state_dict().items()}
    adaptation = ctl.adapt(model, source, strategies)
    optimizer = adaptation.optimizer(**options)
    for _ in range(4):
        optimizer.zero_grad()
        outputs = model(X)
        adaptation.loss(outputs.square().mean(), outputs, X).backward()
        optimizer.step()
    return adaptation


SGD = {"cls": torch.optim.SGD, "lr": 0.05, "momentum": 0.5}
ADAMW = {"cls": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.0}
ALIKE = {
    "plain": ([], ADAMW),
    "coupled": ([ctl.L2SP(alpha=0.7, on="all")], SGD),
    "coupled, annealed, Adam": ([ctl.L2SP(alpha=0.7, on="all", anneal={"steps": 3})], ADAMW),
    "decoupled": ([ctl.L2SP(alpha=2.0, on="all", mode="decoupled")], ADAMW),
    "on the CPU": ([ctl.L2SP(alpha=0.7, on="all", anchors="cpu")], SGD),
    "soft threshold": ([ctl.L1SP(alpha=0.05, on="all", beta=None)], SGD),
    "rows": ([ctl.GroupLassoSP(alpha=0.05, on="all", beta=None)], SGD),
    "projection of tensors": ([ctl.Projection(radius=0.01, on="all")], SGD),
    "projection of rows": ([ctl.Projection(radius=0.01, by="row", on="all")], SGD),
    "mars": ([ctl.Projection(radius=0.01, norm="mars", on="all")], SGD),
    "selective decay": ([ctl.SelectiveDecay(on="all")], SGD),
    "rates by gradient": ([ctl.AutoRGN(every=1)], SGD),
    "half way back": ([ctl.WeightInterpolation(t=0.5)], SGD),
}


@pytest.mark.parametrize(("strategies", "options"), ALIKE.values(), ids=ALIKE)
def test_it_is_as_if_the_parts_were_parameters(strategies, options):
    """The reference is the same network whose real and imaginary parts are real parameters."""
    whole, split = twins()
    ours, theirs = train(whole, strategies, options), train(split, strategies, options)
    for adaptation in (ours, theirs):
        adaptation.finish()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts(tensor), split.state_dict()[name], msg=name)
    assert ours.drift() == pytest.approx(theirs.drift())
    assert ours.penalty().item() == pytest.approx(theirs.penalty().item())
    assert "weight" in ours.plan.trained


def test_penalty_and_drift_by_hand():
    """A shift of 3 + 4i of each of the nine elements is 25 a square."""
    model = Spectral()
    adaptation = ctl.adapt(model, copy.deepcopy(model.state_dict()), [ctl.L2SP(alpha=0.2)])
    size = model.weight.detach().abs().square().sum().item()
    with torch.no_grad():
        model.weight += 3 + 4j
    assert adaptation.penalty().item() == pytest.approx(0.2 / 2 * 9 * 25)
    adaptation.penalty().backward()
    torch.testing.assert_close(model.weight.grad, torch.full((3, 3), 0.2 * (3 + 4j), dtype=torch.complex128))
    drift = adaptation.drift()[adaptation.plan["weight"].layer]
    alone = [row.name for row in adaptation.plan.rows if row.layer == adaptation.plan["weight"].layer]
    others = sum(model.get_parameter(name).detach().abs().square().sum().item() for name in alone if name != "weight")
    assert drift == pytest.approx(math.sqrt(9 * 25 / (size + others)))


@pytest.mark.parametrize("anchors", ["fp32", "bf16", "cpu"])
def test_a_large_one_is_pulled_by_the_term_in_the_loss(anchors):
    """Larger than the buffer that pulls go through, with a part at a time; half precision has no complex numbers."""
    size = chunk(torch.zeros(1)) + 5
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(size, 2, dtype=torch.complex64))
    adaptation = ctl.adapt(
        model, {"weight": torch.zeros(size, 2, dtype=torch.complex64)}, [ctl.L2SP(alpha=0.5, anchors=anchors)]
    )
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
    with torch.no_grad():
        model.weight.copy_(torch.randn(size, 2, dtype=torch.complex64))
    start = model.weight.detach().clone()
    model.weight.real.sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), start - 1 - 0.5 * start)


def test_mixout_mixes_whole_elements():
    """An element is at the source's 0, or twice as far from it; gradients follow."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.complex64))
    model.forward = lambda: model.weight
    adaptation = ctl.adapt(model, {"weight": torch.zeros(4, 8, dtype=torch.complex64)}, [ctl.Mixout(p=0.5)])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
    with torch.no_grad():
        model.weight.fill_(1 + 2j)
    mixed = model()
    assert set(mixed.detach().flatten().tolist()) == {0, 2 + 4j}
    kept = mixed.detach() != 0
    (mixed.real.sum() + mixed.imag.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.where(kept, -1 + 0j, 1 + 2j))


def test_a_fisher_is_refused_before_training():
    model = Spectral()
    with pytest.raises(ctl.SpecError, match=r"FisherSP measures real parameters; 'weight' is torch\.complex128"):
        ctl.adapt(model, copy.deepcopy(model.state_dict()), [ctl.FisherSP()])


def test_a_fresh_one_is_initialised():
    """Its module has no method for it; both parts are drawn."""
    model = Spectral()
    before = model.weight.detach().clone()
    ctl.adapt(model, copy.deepcopy(model.state_dict()), fresh=["weight"])
    assert not (model.weight == before).any()
    assert model.weight.detach().imag.std() > 0


def test_fit_trains_them():
    model = Spectral()
    adaptation = ctl.adapt(model, copy.deepcopy(model.state_dict()), [ctl.L2SP(alpha=0.1), ctl.LPFT(epochs=1)])
    before = model.weight.detach().clone()
    labels = torch.arange(6) % 2
    ctl.fit(adaptation, (X, labels), training=ctl.Training(epochs=2, lr=0.1, device="cpu", clip=1.0), seed=0)
    assert not (model.weight == before).any()
