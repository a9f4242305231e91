"""Every strategy under every way to compute: the weights of the plain path, resumed ones too, and no more waiting."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import conservtl as ctl
from conservtl.methods.registry import builtin_strategies

STRATEGIES = [
    ctl.L2SP(alpha=0.1),
    ctl.L2SP(alpha=0.1, mode="decoupled", anchors="bf16"),
    ctl.LPFT(epochs=1),
    ctl.OutputConservation(),
    ctl.EntropyMinimisation(),
    ctl.LayerTransfer(layers=1, side="input"),
    ctl.DiscriminativeLR(decay=0.8),
    ctl.GradualUnfreezing(by="layer"),
    ctl.FeatureExtraction(),
    ctl.NormAdaptation(),
    ctl.LHUC(),
    ctl.LoRA(rank=1),
    ctl.InputTransform(dim=-3),
    ctl.FeatureConservation(),
    ctl.SpectralShrinkage(),
    ctl.FisherSP(alpha=0.1),
    ctl.SurgicalFineTuning(block="first"),
    ctl.AutoRGN(every=100),
    ctl.Projection(radius=0.01),
    ctl.SelectiveDecay(),
    ctl.L1SP(),
    ctl.GroupLassoSP(),
    ctl.Mixout(p=0.5),
    ctl.WeightInterpolation(),
]
INSIDE = [one for one in STRATEGIES if one.kind in ("lhuc", "input_transform", "mixout", "norm_adaptation")]
"""Strategies that change the forward pass, which a compiler traces."""
DATA = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def each(strategies):
    return pytest.mark.parametrize("strategy", strategies, ids=repr)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 3),
    )


def adapted(strategy):
    return ctl.adapt(network(), network(), [strategy], example=DATA[0][:2])


def trained(strategy, out=None, resume=False, tell=None, **settings):
    adaptation = adapted(strategy)
    fields = {"epochs": 3, "batch_size": 4, "lr": 0.01, "optimizer": "sgd", "device": "cpu", "batch_norm": "eval"}
    training = ctl.Training(**fields | settings)
    ctl.fit(
        adaptation, DATA, {"target": DATA}, training, source=DATA, seed=1, out=out, resume=resume, tell=tell,
    )  # fmt: skip
    return adaptation.model


def close(a, b, rtol, atol):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_each_strategy_is_here():
    assert {type(one) for one in STRATEGIES} == set(builtin_strategies().values())


@each(STRATEGIES)
def test_channels_last_clipping_and_a_fused_step_change_rounding_alone(strategy):
    plain = trained(strategy)
    close(trained(strategy, channels_last=True, clip=1e6, fused=True), plain, rtol=1e-3, atol=1e-5)


@each([one for one in STRATEGIES if one.kind != "mixout"])  # which draws anew for each forward pass
def test_accumulated_batches_are_one_batch(strategy):
    close(trained(strategy, batch_size=2, accumulate=2), trained(strategy), rtol=1e-3, atol=1e-5)


@each(STRATEGIES)
def test_bf16_moves_weights_as_fp32_does(strategy):
    """All of it together, in half the digits; the change from the source is what is compared."""
    start = network().state_dict()
    plain, half = (
        trained(strategy, precision=precision, **more).state_dict()
        for precision, more in (("fp32", {}), ("bf16", {"channels_last": True, "clip": 1e6, "fused": True}))
    )
    moved = {name: plain[name] - start[name] for name in plain if name in start and plain[name].is_floating_point()}
    largest = max(float(change.abs().max()) for change in moved.values())
    for name, change in moved.items():
        assert float((half[name] - start[name] - change).abs().max()) <= 0.1 * largest + 1e-6, name


@each(STRATEGIES)
def test_a_resumed_run_is_the_uninterrupted_one(strategy, tmp_path):
    settings = {"precision": "bf16", "channels_last": True, "clip": 0.5, "accumulate": 2, "fused": True}

    def stop(line):
        if line["epoch"] == 1:
            raise InterruptedError

    whole = trained(strategy, **settings)
    with pytest.raises(InterruptedError):
        trained(strategy, out=tmp_path, tell=stop, **settings)
    resumed = trained(strategy, out=tmp_path, resume=True, **settings)
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in whole.state_dict().items())


@each(INSIDE)
def test_compiled_models_are_those_of_the_plain_run(strategy, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: real(model, **{"backend": "eager", **options, "mode": None})
    )
    try:
        close(trained(strategy, compile=True), trained(strategy), rtol=1e-3, atol=1e-5)
    finally:
        torch.compiler.reset()


class Waits(TorchDispatchMode):
    """Counts the operations for which a host waits for a GPU: reading a number, sizes that depend on values."""

    NAMES = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"})

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.name().partition(".")[0]) in self.NAMES:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(model, optimizer, loss_of):
    """Return what two steps wait for, after one that sets things up."""
    inputs, labels = DATA
    for number in range(3):
        with Waits() as mode:
            outputs = model(inputs)
            loss_of(F.cross_entropy(outputs, labels), outputs, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        if number == 0:
            found = Counter()
        else:
            found += mode.found
    return found


@each(STRATEGIES)
def test_a_step_waits_no_more_often_than_that_of_a_plain_loop(strategy):
    plain = network()
    expected = waits(plain, torch.optim.AdamW(plain.parameters(), fused=True), lambda loss, *_: loss)
    adaptation = adapted(strategy)
    if adaptation.outstanding():
        adaptation.measure([DATA])
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    assert waits(adaptation.model, optimizer, adaptation.loss) == expected
