"""The defects of other tools that docs/peers.md lists: each has a test, and those that no other file holds are here."""

import ast
import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import conservtl as ctl

ROOT = Path(__file__).parents[1]
NAMES = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", (ROOT / "docs" / "peers.md").read_text(encoding="utf-8"))


def test_every_defect_has_a_test():
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| tool", "| ---"))]
    assert len(rows) >= 15
    assert all("`tests/" in row.rpartition("|")[0].rpartition("|")[2] for row in rows)


@pytest.mark.parametrize(("file", "name"), NAMES, ids=[name for _, name in NAMES])
def test_that_test_exists(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("::"):
        (found,) = (node for node in body if getattr(node, "name", None) == part)
        body = found.body
    assert isinstance(found, ast.FunctionDef)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "each"), [("coupled", 1), ("decoupled", 0)])
def test_a_pull_calls_at_most_one_operator_for_each_tensor(mode, each):
    """The loop through autograd calls eight or more for each, in backward too."""

    def network(layers):
        return torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(layers)))

    def calls(layers):
        model = network(layers)
        adaptation = ctl.adapt(model, {**model.state_dict()}, [ctl.L2SP(mode=mode)])
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, foreach=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # the first one makes what later steps reuse
        with Calls() as seen:
            optimizer.step()
        return sum(seen.counts.values())

    def loop(layers):
        model = network(layers)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        with Calls() as seen:
            pairs = zip(model.parameters(), start, strict=True)
            (0.05 * sum(((parameter - anchor) ** 2).sum() for parameter, anchor in pairs)).backward()
        return sum(seen.counts.values())

    assert calls(80) - calls(10) == 70 * each
    assert loop(80) - loop(10) >= 70 * 8


@pytest.mark.parametrize(
    "strategy",
    [ctl.AutoRGN(every=2), ctl.Mixout(p=0.5), ctl.SelectiveDecay(), ctl.Projection(radius=0.05), ctl.L1SP(alpha=0.01)],
    ids=lambda strategy: strategy.label,
)
def test_the_state_of_every_update_resumes(strategy):
    """Six steps are three, saved and loaded into new objects, and three more."""
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    source = copy.deepcopy(first.state_dict())

    def begin(state=None):
        model = copy.deepcopy(first)
        adaptation = ctl.adapt(model, source, [strategy])
        if state is not None:
            adaptation.load_state_dict(state[1])
            model.load_state_dict(state[0])
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state[2])
        return model, adaptation, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, _, optimizer = begin()
    train(whole, optimizer, range(6))
    half, adaptation, optimizer = begin()
    train(half, optimizer, range(3))
    state = copy.deepcopy([each.state_dict() for each in (half, adaptation, optimizer)])
    resumed, _, optimizer = begin(state)
    train(resumed, optimizer, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
