"""Behaviour on a GPU: loss scaling, held data, no waiting for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.batches import rows_on

pytestmark = pytest.mark.gpu


def _trained(precision, alpha, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))
    source = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(50, 3, 12, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=alpha)])
    training = ctl.Training(epochs=10, batch_size=16, lr=0.1, optimizer="sgd", precision=precision, **settings)
    return adaptation, ctl.fit(adaptation, data, training=training, seed=1)


WEIGHTS = [
    ctl.L2SP(on="all"),
    ctl.L2SP(on="all", mode="decoupled"),
    ctl.L2SP(anchors="bf16"),
    ctl.L2SP(anchors="cpu"),
    ctl.L2SP(anchors="cpu", mode="decoupled"),
    ctl.L2SP(depth=(1, 0.1), every=2),
    ctl.L2SP(mode="decoupled", every=2),
    ctl.L2SP(anneal=ctl.Anneal(steps=10)),
    ctl.L2SP(mode="decoupled", anneal=ctl.Anneal(steps=10)),
]


@pytest.mark.parametrize(
    "strategy",
    [
        *(one for one in WEIGHTS if one.anchors != "bf16"),
        ctl.Projection(radius=0.01),
        ctl.Projection(radius=0.01, norm="mars", on="all"),
        ctl.Projection(radius=0.01, by="row"),
        ctl.SelectiveDecay(),
        ctl.L1SP(on="all"),
        ctl.GroupLassoSP(on="all"),
        ctl.AutoRGN(every=2),
    ],
    ids=str,
)
def test_programs_compute_what_a_cpu_computes(strategy):
    """In double precision, channels last, in steps of AdamW at a rate for each layer."""
    moved = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        model = model.double().to(device, memory_format=torch.channels_last).eval()
        chosen = [strategy, ctl.DiscriminativeLR(decay=0.5)]
        adaptation = ctl.adapt(model, copy.deepcopy(model), chosen)
        optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-2)
        inputs = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
        for _ in range(4):
            F.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 3], device=device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append([parameter.detach().cpu() for parameter in model.parameters()])
    for ours, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_masks_are_the_same_after_resuming():
    """They are drawn by a counter of seed, step and parameter."""
    drawn = []
    for _ in range(2):
        model = nn.Linear(100, 50).cuda()
        adaptation = ctl.adapt(model, {n: torch.zeros_like(p) for n, p in model.state_dict().items()}, [ctl.Mixout()])
        adaptation.optimizer(torch.optim.SGD, lr=0.1)
        with torch.no_grad():
            model.weight.fill_(1.0)
        model(torch.zeros(1, 100, device="cuda"))
        drawn.append(model.weight.detach().clone())
    assert torch.equal(*drawn)
    assert 0.2 < (drawn[0] != 0).double().mean() < 0.4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_fp16_pulls_as_fp32_does(fused, clip):
    """A scaler multiplies gradients by 65536; a fused optimizer divides inside its step, after the pull."""
    exact, _ = _trained("fp32", 1.0, clip=clip)
    free, _ = _trained("fp32", 0.0, clip=clip)
    scaled, result = _trained("fp16", 1.0, fused=fused, clip=clip)
    assert result.precision == "fp16"
    assert result.device.startswith("cuda")
    for layer, drift in scaled.drift().items():
        assert drift == pytest.approx(exact.drift()[layer], rel=0.05)
        assert drift < 0.9 * free.drift()[layer]


def test_bf16_is_what_auto_means():
    adaptation, result = _trained("auto", 0.1)
    assert result.precision == ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")
    assert {p.dtype for p in adaptation.model.parameters()} == {torch.float32}


def test_held_data_lives_on_the_device(plain, data):
    devices = set()

    def loss(outputs, batch):
        found = {batch[0].device.type, batch[1].device.type, outputs.device.type}
        devices.update(found)
        return F.cross_entropy(outputs, batch[1])

    ctl.fit(plain(), data, {"target": data}, ctl.Training(epochs=2, batch_size=16), loss=loss)
    assert devices == {"cuda"}


def test_kept_outputs(plain, data):
    ours, theirs = plain(ctl.LayerTransfer(side="input", layers=1)), plain(ctl.LayerTransfer(side="input", layers=1))
    training = ctl.Training(epochs=3, batch_size=16, lr=0.05, optimizer="sgd", precision="fp32")
    result = ctl.fit(ours, data, training=training, seed=1)
    ctl.fit(theirs, data, training=training, seed=1, keep_frozen_outputs=False)
    assert result.kept_outputs
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_rows_of_what_host_or_device_hold_are_taken_without_a_wait():
    index, held = torch.tensor([2, 0]), torch.arange(6.0).view(3, 2)
    on_device = held.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [rows_on(torch.device("cuda"), one, index) for one in (held, on_device)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [one.tolist() for one in rows] == [[[4.0, 5.0], [0.0, 1.0]]] * 2


def test_a_loss_looked_at_late_is_named_all_the_same(plain, data):
    """Losses are read every 50 steps and at the end of an epoch; the message names the right batch."""
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, batch[1]) * (float("nan") if calls == 6 else 1.0)

    with pytest.raises(ctl.TrainingDivergedError, match=r"batch 2 of epoch 2 \(step 6"):
        ctl.fit(plain(), data, training=ctl.Training(epochs=3, batch_size=16), loss=loss)


def test_deterministic(plain, data, same):
    first, second = plain(), plain()
    for adaptation in (first, second):
        training = ctl.Training(epochs=2, batch_size=16, deterministic=True, precision="fp32")
        ctl.fit(adaptation, data, training=training, seed=1)
    assert same(first.model, second.model)


@pytest.mark.parametrize(
    "strategy",
    [
        ctl.AutoRGN(every=100),
        ctl.Projection(radius=0.01),
        ctl.Projection(radius=0.01, by="row", norm="mars"),
        ctl.SelectiveDecay(),
        ctl.L1SP(),
        ctl.GroupLassoSP(),
        ctl.Mixout(),
        *WEIGHTS,
        ctl.OutputConservation(),
        ctl.EntropyMinimisation(),
        ctl.LoRA(rank=1),
        ctl.FeatureConservation(layers=1),
        ctl.FeatureConservation(layers=1, metric="ldifs"),
        ctl.LHUC(freeze=False),
        ctl.InputTransform(freeze=False),
        ctl.SpectralShrinkage(k=2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_waits_for_nothing(strategy):
    """No update reads a number on the host; the rates from gradient norms do so where they decide, once in a while."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).cuda()
    adaptation = ctl.adapt(model, copy.deepcopy(model), [strategy])
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    inputs = torch.randn(32, 8, device="cuda")
    labels = torch.zeros(32, dtype=torch.long, device="cuda")
    for number in range(6):  # the first steps copy what they need to the device, those of every=2 in the second
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            with torch.autocast("cuda", torch.float16):
                outputs = model(inputs)
                loss = adaptation.loss(F.cross_entropy(outputs, labels), outputs, inputs)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()


@pytest.mark.parametrize("decoupled", [False, True])
def test_without_triton_pulls_that_repeat_are_replayed_from_a_graph(decoupled):
    from conservtl.kernels.pull import Pull, Pulled
    from conservtl.kernels.replayed import Replayed

    weights = [[nn.Parameter(torch.full((5, n), 2.0, device="cuda")) for n in (3, 70)] for _ in range(2)]
    group = {"lr": 0.1} if decoupled else None
    plain, other = ([Pulled(one, torch.ones_like(one).detach(), 0.5, group) for one in side] for side in weights)
    pull, replayed = Pull(plain, {}), Replayed(Pull(other, {}), other)
    for item in (*plain, *other):
        item.parameter.grad = torch.zeros_like(item.parameter)
    for _ in range(8):
        for kernel in (pull, replayed):
            kernel.move_weights() if decoupled else kernel.add_gradients()
        for one, two in zip(plain, other, strict=True):
            assert torch.equal(one.parameter, two.parameter)
            assert torch.equal(one.parameter.grad, two.parameter.grad)
    assert replayed._graph is not None


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_in_a_graph_of_the_caller_is_the_step(mode):
    """Its gradients lie in the graph's own memory, so tables are sent inside it; steps without it have their own."""
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(30, 40).cuda()
        start = {name: torch.zeros_like(one) for name, one in model.state_dict().items()}
        optimizer = ctl.adapt(model, start, [ctl.L2SP(on="all", mode=mode)]).optimizer(torch.optim.SGD, lr=0.01)
        inputs = torch.randn(8, 30, device="cuda")

        def step(model=model, optimizer=optimizer, inputs=inputs):
            model(inputs).square().mean().backward()
            optimizer.step()

        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                optimizer.zero_grad()
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for number in range(6):
            if number == 3:  # without the graph, and with it again: nothing is mixed up
                optimizer.zero_grad(set_to_none=not captured)
                step()
            elif captured:
                graph.replay()
            else:
                optimizer.zero_grad()
                step()
        found.append([one.detach().clone() for one in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
