"""Two processes train the same weights as one process with batches twice as large."""

from __future__ import annotations

import copy
import os
import socket
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl
from conservtl.engine import processes


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, 6, generator=generator), torch.randint(0, 3, (30,), generator=generator)


def _adaptation(pull=None):
    model = _model()
    strategies = [pull or ctl.L2SP(alpha=0.5), ctl.GradualUnfreezing(by="layer")]
    return ctl.adapt(model, copy.deepcopy(model), strategies)


def _train(adaptation, batch_size, data=None, **options):
    training = ctl.Training(
        epochs=3, batch_size=batch_size, optimizer="sgd", lr=0.05, accumulate=2, clip=1.0, device="cpu"
    )
    return ctl.fit(adaptation, data or _data(), {"target": _data()}, training, seed=2, **options)


def _join(rank, port):
    """Make this process one of two."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Writing(nn.Sequential):
    """In one process of two, a later pass writes into an output that no pass before wrote into."""

    late, passes = False, 0

    def forward(self, inputs):
        hidden = self[0](inputs)
        self.passes += self.training
        hidden = hidden.tanh_() if self.late and self.passes > 3 else hidden.tanh()
        return self[2](hidden)


def _writing(*, late=False):
    torch.manual_seed(0)
    model = _Writing(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    strategies = [ctl.FeatureConservation(layers=("0",), alpha=0.5), ctl.L2SP(alpha=0.5)]
    adaptation = ctl.adapt(model, copy.deepcopy(model), strategies)
    model.late = late
    return adaptation


def _compared():
    model = _model()
    strategies = [ctl.OutputConservation(weight=2.0), ctl.FeatureConservation(layers=("0",), alpha=0.5)]
    return ctl.adapt(model, copy.deepcopy(model), strategies)


def _others(batch, _):
    return torch.cat([2 * batch[0], batch[0] + 1]), torch.cat([batch[1], batch[1]])


def _process(rank, port, folder):
    _join(rank, port)
    _train(compared := _compared(), 4, proxies=_others)
    torch.save(compared.model.state_dict(), f"{folder}/compared{rank}.pt")
    writing = _writing(late=rank == 1)
    _train(writing, 4)
    torch.save((writing.model.state_dict(), writing.model.passes), f"{folder}/writing{rank}.pt")
    adaptation = _adaptation()
    result = _train(adaptation, 4, out=folder)
    loader = DataLoader(TensorDataset(*_data()), 4, shuffle=True)
    weighed = _adaptation(ctl.FisherSP(alpha=0.5))
    streamed = _train(weighed, 4, loader)
    found = weighed.model.state_dict(), weighed.measured["fisher"]
    losses = [line["loss"] for line in result.history]
    torch.save((adaptation.model.state_dict(), result.steps, streamed.steps, *found, losses), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _draw(rank, port, folder):
    """Save augmentations: uninterrupted, resumed, and resumed with the generators of process 0 only."""
    _join(rank, port)

    def run(stop=False, **options):
        drawn = []

        def augment(batch, generator):
            drawn.append(torch.rand(1, generator=generator).item())
            return batch

        def tell(line):
            if stop:
                raise KeyboardInterrupt

        training = ctl.Training(epochs=2, batch_size=4, device="cpu")
        with suppress(KeyboardInterrupt):
            ctl.fit(_adaptation(), _data(), training=training, seed=2, augment=augment, tell=tell, **options)
        torch.distributed.barrier()
        return drawn

    whole = run()
    begun = run(stop=True, out=f"{folder}/run")
    file = f"{folder}/run/checkpoint.pt"
    alone = torch.load(file, weights_only=True)
    torch.distributed.barrier()
    rest = run(out=f"{folder}/run", resume=True)
    if rank == 0:
        torch.save({key: value for key, value in alone.items() if key != "processes"}, file)
    torch.distributed.barrier()
    anew = run(out=f"{folder}/run", resume=True)
    torch.save((whole, begun, rest, anew), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_each_process_goes_on_with_its_own_augmentations(side_by_side, port, tmp_path):
    side_by_side(_draw, (port, str(tmp_path)))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for whole, begun, rest, anew in parts:
        assert begun + rest == whole
        assert len(anew) == len(rest) > 0
    assert not set(parts[0][0]) & set(parts[1][0])
    assert parts[0][3] == parts[0][2]
    assert not set(parts[0][3]) & set(parts[1][3])
    assert not set(parts[1][0]) & set(parts[1][3]), "nor what was drawn before"


def _search(rank, port, folder):
    """Look for a batch size where process 1 has room for 5 examples, or for none; and run out of memory in a step."""
    _join(rank, port)

    processes._PATIENCE = 1.0  # seconds in which a process that is not lost answers

    def run(room, batch_size, data):
        def forward(model, batch):
            if torch.is_grad_enabled() and len(batch[0]) > (room if rank else 100):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
            return model(batch[0])

        adaptation = _adaptation()
        training = ctl.Training(epochs=2, batch_size=batch_size, optimizer="sgd", lr=0.05, device="cpu")
        try:
            result = ctl.fit(adaptation, data, training=training, forward=forward, seed=2)
        except ctl.ConservtlError as error:
            return f"{type(error).__name__}: {error}"
        return adaptation.model.state_dict(), result.steps, result.execution

    loader = DataLoader(TensorDataset(*_data()), 3, shuffle=True)
    found = [run(5, "auto", _data()), run(5, "auto", loader), run(0, "auto", _data()), run(5, 6, _data())]
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_the_process_with_the_least_memory_decides(side_by_side, port, tmp_path):
    """Each searches by itself; all take the least, and all say so if one has no room at all."""
    side_by_side(_search, (port, str(tmp_path)))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for held, streamed, none, _ in parts:
        assert (held[1], streamed[1]) == (8, 8), "30 examples in batches of 4 for each of two, twice"
        assert "batches of 4" in held[2]
        assert "batches of 4" in streamed[2]
        assert none.startswith("MemoryLimitError: training.batch_size is auto, but a step runs out of memory on cpu")
    for which in (0, 1):
        one, two = (part[which][0] for part in parts)
        assert all(map(torch.equal, one.values(), two.values()))
    alone = ctl.Training(epochs=2, batch_size=8, optimizer="sgd", lr=0.05, device="cpu")
    ctl.fit(adaptation := _adaptation(), _data(), training=alone, seed=2)
    for name, tensor in adaptation.model.state_dict().items():
        torch.testing.assert_close(parts[0][0][0][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    lost, full = (part[3] for part in parts)
    assert lost.startswith("ProcessLostError: rank 1 of 2 stopped")
    assert "batch_size=6 and accumulate=1 ran out of memory on cpu:0 in process 1 of 2 (CUDA out of memory." in full
    assert "Halve batch_size and double accumulate, which makes the same steps, or set batch_size to auto." in full


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_equal_one(side_by_side, port, tmp_path):
    """Each process gets its part of one order; the pull and the phases act in both."""
    side_by_side(_process, (port, str(tmp_path)))
    alone = _adaptation()
    result = _train(alone, 8)
    _train(writing := _writing(), 8)
    _train(compared := _compared(), 8, proxies=_others)
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"compared{rank}.pt")
        for name, tensor in compared.model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        (tmp_path / f"compared{rank}.pt").unlink()
    for rank, repeated in ((0, 0), (1, 1)):
        weights, passes = torch.load(tmp_path / f"writing{rank}.pt")
        assert passes == writing.model.passes + repeated
        for name, tensor in writing.model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        (tmp_path / f"writing{rank}.pt").unlink()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    weighed = _adaptation(ctl.FisherSP(alpha=0.5))
    weighed.measure([_data()])
    for weights, steps, streamed, _, fisher, losses in parts:
        assert losses == pytest.approx([line["loss"] for line in result.history], rel=1e-4)  # of all processes' batches
        for name, tensor in weighed.measured["fisher"].items():  # of all examples, not of a process's own
            torch.testing.assert_close(fisher[name], tensor, msg=name)
        assert steps == streamed == result.steps
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for which in (0, 3):
        assert all(torch.equal(a, b) for a, b in zip(parts[0][which].values(), parts[1][which].values(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "history.jsonl",
        "rank0.pt",
        "rank1.pt",
    ]
