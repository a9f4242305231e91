"""The next batch's copy begins before it is asked for, and never more than one is ahead."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice

import pytest
import torch

from conservtl.engine.prefetch import Ahead, ahead


class Side:
    """A stream that notes what is copied and joined."""

    def __init__(self):
        self.events = []

    def run(self, copy):
        result = copy()
        self.events.append(f"copy {result}")
        return result, result

    def join(self, mark):
        self.events.append(f"use {mark}")


def test_one_batch_is_copied_ahead():
    side = Side()
    batches = Ahead(iter(range(3)), lambda content: content, side)
    first, second, third = islice(batches, 3)
    assert side.events == ["copy 0"]
    assert [first(), second(), third()] == [0, 1, 2]
    assert side.events == ["copy 0", "use 0", "copy 1", "use 1", "copy 2", "use 2"]
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_is_copied_as_soon_as_it_is_loaded():
    side = Side()
    batches = Ahead(iter("ab"), str.upper, side)
    next(batches)()
    following = next(batches)
    assert side.events == ["copy A", "use A", "copy B"]
    assert following() == "B"


def test_one_that_is_passed_over_is_kept_for_later():
    side = Side()
    first, second = Ahead(iter("ab"), str.upper, side)
    assert second() == "B"
    assert first() == "A"


def test_a_cpu_moves_each_when_it_is_asked_for():
    moved = []
    batches = list(ahead(iter(range(2)), moved.append, torch.device("cpu")))
    assert not moved
    for batch in batches:
        batch()
    assert moved == [0, 1]


def test_a_copy_waits_for_the_work_before_and_is_waited_for(monkeypatch):
    """So memory that an earlier batch has left is not written while it is read, whatever object held it."""
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"mark of {self.name}"

    current = Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    first, second = ahead(iter("ab"), lambda one: said.append(f"copy {one}"), torch.device("cuda"))
    first()
    second()
    joined = "current waits for mark of side"
    assert said == ["side waits for current", "copy a", joined, "side waits for current", "copy b", joined]


@pytest.mark.gpu
def test_on_a_gpu_the_values_are_those_of_the_host():
    device = torch.device("cuda")
    host = [torch.full((1 << 20,), float(number)).pin_memory() for number in range(8)]
    for number, batch in enumerate(ahead(iter(host), lambda one: one.to(device, non_blocking=True), device)):
        assert float((batch() * 2).sum()) == number * 2 * (1 << 20)
