"""Graphs of pulls without a GPU: the capture is a stand-in that holds to the rules of the real one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.kernels.fused import table
from conservtl.kernels.pull import Pull, Pulled
from conservtl.kernels.replayed import Replayed, capture


class Captures:
    """Captures work without doing it; replays it with the numbers and in the memory that it was captured with."""

    def __init__(self, items, fails=False):
        self.items, self.fails, self.made, self.replayed = items, fails, 0, 0

    def __call__(self, work, device):
        assert device == self.items[0].parameter.device
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.made += 1
        self.work = work
        self.places = self._places()
        return self

    def replay(self):
        self.replayed += 1
        assert self._places() == self.places
        self.work()

    def _places(self):
        return [None if item.parameter.grad is None else item.parameter.grad.data_ptr() for item in self.items]


def pulled(count=3, group=None, anchor=True):
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        weight = nn.Parameter(torch.randn(4, number + 1, generator=generator))
        weight.grad = torch.zeros_like(weight)
        items.append(Pulled(weight, torch.ones_like(weight).detach() if anchor else None, 0.5, group))
    return items


def twins(**how):
    """A pull by itself, and one with graphs, on equal parameters."""
    plain, other = pulled(**how), pulled(**how)
    captures = Captures(other)
    return plain, Pull(plain, {}), other, Replayed(Pull(other, {}), other, captures), captures


def same(items, others):
    for one, other in zip(items, others, strict=True):
        assert torch.equal(one.parameter, other.parameter)
        assert torch.equal(one.parameter.grad, other.parameter.grad)


def test_steps_that_repeat_are_replayed_and_do_the_same():
    plain, pull, other, replayed, captures = twins()
    for step in range(7):
        pull.add_gradients(1.0)
        replayed.add_gradients(1.0)
        same(plain, other)
        assert (captures.made, captures.replayed) == (int(step >= 3), max(0, step - 2))


def test_a_graph_is_left_as_soon_as_something_differs():
    """Another factor, gradients elsewhere or missing, a loss scale; and taken again afterwards."""
    plain, pull, other, replayed, captures = twins()
    scale = torch.tensor(4.0)
    for step in range(16):
        factor = 0.5 if step == 6 else 1.0
        carried = scale if step == 7 else None
        for items in (plain, other):
            if step == 9:
                items[0].parameter.grad = None
            if step == 11:
                items[1].parameter.grad = items[1].parameter.grad.clone()
            if step == 13:
                items[2].parameter.grad = items[2].parameter.grad.to_sparse(1)
        pull.add_gradients(factor, carried)
        replayed.add_gradients(factor, carried)
        same(plain, other)
    assert captures.made >= 1
    assert 0 < captures.replayed < 13


def test_decoupled_pulls_follow_the_rate_and_the_skip():
    group = {"lr": 0.1}
    plain, pull, other, replayed, captures = twins(group=group)
    found = torch.zeros(1)
    for step in range(12):
        group["lr"] = 0.2 if step == 6 else 0.1
        found.fill_(float(step == 10))  # the graph reads it where it is
        pull.move_weights(1.0, found)
        replayed.move_weights(1.0, found)
        same(plain, other)
    assert captures.made == 1
    assert captures.replayed == 12 - 3 - 1


def test_a_rate_that_changes_in_each_step_is_never_captured():
    group = {"lr": 0.1}
    plain, pull, other, replayed, captures = twins(group=group)
    for step in range(8):
        group["lr"] = 0.1 / (step + 1)
        pull.move_weights()
        replayed.move_weights()
        same(plain, other)
    assert not captures.made


@pytest.mark.parametrize("anchor", [True, False])
def test_a_failed_capture_is_not_tried_again(anchor):
    plain, other = pulled(anchor=anchor), pulled(anchor=anchor)
    captures = Captures(other, fails=True)
    pull, replayed = Pull(plain, {}), Replayed(Pull(other, {}), other, captures)
    for step in range(6):
        pull.add_gradients()
        said = r"not be captured in a CUDA graph \(operation not permitted when stream is capturing\); it goes on"
        with pytest.warns(UserWarning, match=said) if step == 3 else nullcontext():
            replayed.add_gradients()
        same(plain, other)
    assert not captures.replayed


def test_a_pull_in_a_graph_of_the_caller_takes_part_itself(monkeypatch):
    """A graph that is replayed or captured while another is captured would break that."""
    _, _, other, replayed, captures = twins()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(replayed, "_device", torch.device("cuda", 0))
    for _ in range(6):
        replayed.add_gradients()
    assert not captures.made
    assert float(other[0].parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("fails", [True, False])
def test_a_capture_is_made_on_the_devices_own_stream_and_leaves_the_callers(fails, monkeypatch):
    """torch does not go back to the caller's stream if a capture fails, and has one stream for captures of all GPUs."""
    device, seen = torch.device("cuda", 1), []

    @contextmanager
    def graph(of, *, stream, capture_error_mode):
        assert (stream, capture_error_mode) == ("stream of cuda:1", "thread_local")
        seen.append("begun")
        yield
        if fails:
            raise RuntimeError("capture failed")

    stands = {"CUDAGraph": lambda: "graph", "graph": graph, "Stream": "stream of {}".format, "device": nullcontext}
    stands |= {"current_stream": "the caller's on {}".format, "set_stream": seen.append}
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    with pytest.raises(RuntimeError, match="capture failed") if fails else nullcontext():
        assert capture(lambda: seen.append("done"), device) == "graph"
    assert seen == ["begun", "done", "the caller's on cuda:1"]


def test_anchors_elsewhere_are_not_captured():
    items = pulled()
    items = [replace(item, anchor=item.anchor.to("meta")) for item in items]
    assert not Replayed(Pull(pulled(), {}), items)._able


def test_addresses_that_a_graph_of_the_caller_sends_serve_it_alone(monkeypatch):
    """At each replay it sends them from the host's memory, which must stay; before the first they are not there."""
    monkeypatch.setattr(table, "_captured", kept := [])
    addresses = table.Addresses(torch.device("cpu"))
    before = addresses.at([16, 32])
    with monkeypatch.context() as patch:
        patch.setattr(table, "capturing", lambda: True)
        captured = [addresses.at([16, 32]), addresses.at([16, 36])]
    assert [host.tolist() for host in kept] == [[16, 32], [16, 36]]
    assert not addresses.aligned
    after = addresses.at([16, 36])
    assert addresses.at([16, 36]) is after
    assert addresses.at([16, 32]).tolist() == before.tolist()
    assert addresses.aligned
    assert len({id(one) for one in (before, *captured, after)}) == 4
    assert len(kept) == 2


@pytest.mark.parametrize(
    ("strategy", "refused"),
    [
        (ctl.L2SP(), False),
        (ctl.L2SP(mode="decoupled"), False),
        (ctl.L2SP(every=2), True),
        (ctl.L2SP(anchors="cpu"), True),
        (ctl.L2SP(anneal=ctl.Anneal(steps=9)), True),
        (ctl.Mixout(), True),
        (ctl.Projection(), True),
    ],
    ids=str,
)
def test_a_step_that_needs_the_host_is_not_captured(strategy, refused, monkeypatch):
    model = nn.Linear(3, 2)
    adaptation = ctl.adapt(model, {name: one.clone() for name, one in model.state_dict().items()}, [strategy])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    monkeypatch.setattr("conservtl.runtime.step_hook.capturing", lambda: True)
    message = r"needs the host at each step, and a CUDA graph .* call optimizer.step\(\) after each replay"
    with pytest.raises(ctl.SpecError, match=message) if refused else nullcontext():
        optimizer.step()
