"""Phases, updates and terms on compiled models: the same weights as without a compiler, up to rounding."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

import conservtl as ctl

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Net(nn.Module):
    """A body of two layers with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        # Without a bias, whose gradient before a norm is rounding alone, which Adam would enlarge.
        self.first, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).tanh()).tanh())


def network() -> Net:
    torch.manual_seed(0)
    return Net()


SOURCE = network().state_dict()


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def in_parts(model: nn.Module, backend: str) -> nn.Module:
    model.first = torch.compile(model.first, backend=backend)
    model.second.compile(backend=backend)
    return model


def in_a_function(model: nn.Module, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(lambda x: model(x), backend=backend)


WAYS = {"whole": whole, "in place": in_place, "in parts": in_parts}
STRATEGIES = {
    "probe": [ctl.LPFT(epochs=1)],
    "layers": [ctl.GradualUnfreezing(by="layer")],
    "layers, other side": [ctl.GradualUnfreezing(by="layer", at="input")],
    "stages": [ctl.GradualUnfreezing(phases=[{"train": ["first"], "epochs": 1}, {"train": ["head"], "epochs": 1}, {}])],
    "probe and pull": [ctl.LPFT(epochs=1), ctl.L2SP(alpha=0.3, on="all")],
    "held norm": [ctl.LayerTransfer(layers=["first"])],
    "mixout": [ctl.Mixout(p=0.5)],
    "mixout in phases": [ctl.LPFT(epochs=1), ctl.Mixout(p=0.5, on="all")],
    "features": [ctl.FeatureConservation()],
    "outputs": [ctl.OutputConservation()],
    "source norms": [ctl.NormAdaptation(statistics="source", train="all")],
}


def run(
    strategies: list[ctl.Strategy],
    when: str,
    compile_: Callable[[nn.Module, str], Callable[[torch.Tensor], torch.Tensor]] | None,
    backend: str = "aot_eager",
) -> dict[str, torch.Tensor]:
    """Train through all phases, compiled before or after ``adapt``, run before it or not."""
    torch.compiler.reset()
    model = network()
    compiled: Callable[[torch.Tensor], torch.Tensor] = model
    if compile_ is not None and when != "after":
        compiled = compile_(model, backend)
        if when == "before, and run":
            state = copy.deepcopy(model.state_dict())
            compiled(X).sum().backward()
            model.load_state_dict(state)
            model.zero_grad()
    handed_in = compiled if isinstance(compiled, nn.Module) else model
    adaptation = ctl.adapt(handed_in, SOURCE, strategies)
    if compile_ is not None and when == "after":
        compiled = compile_(adaptation.model, backend)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.05)
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        adaptation.model.train()
        for _ in range(3):
            optimizer.zero_grad()
            outputs = compiled(X)
            adaptation.loss(nn.functional.cross_entropy(outputs, Y), outputs, X).backward()
            optimizer.step()
    adaptation.restore_weights()
    return {name.replace("_orig_mod.", ""): t.detach().clone() for name, t in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _clean():
    yield
    torch.compiler.reset()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


CASES = [
    *((name, way, when) for name in STRATEGIES for way, when in (("whole", "before, and run"), ("in parts", "after"))),
    *((name, way, when) for name in ("probe", "mixout") for way in WAYS for when in ("after", "before")),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, while it compiles
@pytest.mark.parametrize(("name", "way", "when"), dict.fromkeys(CASES))
def test_a_loop_reaches_the_same_weights(name, way, when):
    """The reference is the same loop without a compiler."""
    expected = run(STRATEGIES[name], "after", None)
    assert any(not torch.equal(tensor, SOURCE[key]) for key, tensor in expected.items())
    assert_same(run(STRATEGIES[name], when, WAYS[way]), expected)


@pytest.mark.parametrize("name", ["probe", "mixout in phases"])
def test_a_compiled_function_that_calls_the_model(name):
    """No compiled module is to be found there."""
    for when in ("after", "before, and run"):
        assert_same(run(STRATEGIES[name], when, in_a_function), run(STRATEGIES[name], "after", None))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which inductor imports
@pytest.mark.parametrize("name", ["probe and pull", "mixout in phases"])
def test_inductor(name):
    """The default backend, where there is a compiler of C++."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    assert_same(run(STRATEGIES[name], "before, and run", whole, "inductor"), run(STRATEGIES[name], "after", None))


@pytest.mark.parametrize("name", ["probe", "layers", "mixout in phases"])
@pytest.mark.parametrize("when", ["handed in", "in place", "in place, later"])
def test_fit(name, when):
    """``fit`` runs the model that was handed in, or one that is compiled in place."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model: nn.Module = network()
        handed_in = torch.compile(model, backend="aot_eager") if compiled and when == "handed in" else model
        if compiled and when == "in place":
            model.compile(backend="aot_eager")
            state = copy.deepcopy(model.state_dict())
            model(X)
            model.load_state_dict(state)
        adaptation = ctl.adapt(handed_in, SOURCE, STRATEGIES[name])
        if compiled and when == "in place, later":
            model.compile(backend="aot_eager")
        training = ctl.Training(epochs=len(adaptation.plan.phases) + 1, lr=0.05, device="cpu", batch_size=4)
        ctl.fit(adaptation, (X, Y), training=training, seed=0)
        results.append(copy.deepcopy(model.state_dict()))
    assert_same(results[1], results[0])


def test_decide():
    """What a new fact frees gets gradients, although a graph was made while it was frozen."""
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    adaptation = ctl.adapt(compiled, SOURCE, [ctl.SurgicalFineTuning(block="best", candidates=["head", "first"])])
    for block in ("head", "first"):
        adaptation.replan(surgical_block=block)
        compiled(X).sum().backward()
        got = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert got == {row.name.split(".")[0] for row in adaptation.plan.rows if row.layer == block}
        model.zero_grad()


def test_what_is_frozen_by_hand_under_a_graph_does_not_move():
    """Nor does it get a gradient, whenever the graph was made."""
    model = network()
    adaptation = ctl.adapt(model, SOURCE)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    compiled(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.first.requires_grad_(False)
    before = model.first.weight.detach().clone()
    compiled(X).sum().backward()
    adaptation.keep_frozen()
    optimizer.step()
    assert model.first.weight.grad is None
    assert torch.equal(model.first.weight, before)


@pytest.mark.parametrize("name", ["features", "mixout"])
@pytest.mark.parametrize("when", ["before adapt", "after adapt", "between steps"])
def test_another_model_of_the_class_is_compiled_too(name, when):
    """A graph without hooks, made for one model, is not used for the model with hooks."""
    strategy = ctl.FeatureConservation(metric="delta", alpha=5.0) if name == "features" else ctl.Mixout(p=0.9)
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model, other = network(), network()
        runs = {"model": model, "other": other}
        if compiled:
            runs = {key: torch.compile(one, backend="aot_eager") for key, one in runs.items()}

        def run_other(moment, runs=runs):
            if moment == when:
                runs["other"](X).sum().backward()

        run_other("before adapt")
        adaptation = ctl.adapt(runs["model"], SOURCE, [strategy])
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        run_other("after adapt")
        for _ in range(3):
            run_other("between steps")
            torch.manual_seed(0)
            outputs = runs["model"](X)
            loss = nn.functional.cross_entropy(outputs, Y)
            (adaptation.loss(loss, outputs, X) if name == "features" else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        adaptation.finish([(X, Y)])
        results.append(copy.deepcopy(model.state_dict()))
    assert_same(results[1], results[0])
