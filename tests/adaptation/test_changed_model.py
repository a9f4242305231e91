"""A model that is changed after ``adapt`` is refused in one sentence; wrapping and moving it is no change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.freezing import tracks_statistics

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two linear layers with norms, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class LowRank(nn.Module):
    """What an adapter library puts in place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def adapted(*strategies: ctl.Strategy, classes: int = 3) -> ctl.Adaptation:
    torch.manual_seed(0)
    return ctl.adapt(Net(classes), Net(3).state_dict(), strategies)


def step(adaptation: ctl.Adaptation, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    (adaptation.model if model is None else model)(X).square().mean().backward()
    optimizer.step()


def wrap(model: Net) -> None:
    model.head = LowRank(model.head)


def peft(model: Net) -> None:
    library = pytest.importorskip("peft")
    library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["head"]))


def larger(model: Net) -> None:
    model.head = nn.Linear(4, 7)


def renamed(model: Net) -> None:
    model.classifier = model.head
    del model.head
    model.forward = lambda x: model.classifier(model.body(x))


def added(model: Net) -> None:
    model.extra = nn.Linear(4, 4)


def removed(model: Net) -> None:
    model.body[3].bias = None


def other_head(model: Net) -> None:
    model.head = nn.Linear(4, 3)


CHANGES = {
    "an adapter": (
        wrap,
        r"'head\.weight' is gone and 'head\.base_layer\.weight' is new \(parameters gone: 2, new: 4\)",
    ),
    "peft": (peft, r"'head\.weight' is gone and 'head\.base_layer\.weight' is new"),
    "a larger head": (larger, r"'head\.weight' has shape \(7, 4\), and had \(3, 4\)"),
    "another name": (renamed, r"'head\.weight' is gone and 'classifier\.weight' is new \(parameters gone: 2, new: 2\)"),
    "one more module": (added, r"'extra\.weight' is new \(parameters gone: 0, new: 2\)"),
    "a bias less": (removed, r"'body\.3\.bias' is gone \(parameters gone: 1, new: 0\)"),
}
STRATEGIES = {
    "plain": [],
    "pull": [ctl.L2SP(alpha=0.1, on="all")],
    "decoupled": [ctl.L2SP(alpha=1.0, mode="decoupled")],
    "mixout": [ctl.Mixout(p=0.5)],
    "phases": [ctl.LPFT(epochs=1)],
    "features": [ctl.FeatureConservation()],
    "fisher": [ctl.FisherSP()],
    "back": [ctl.WeightInterpolation(t=0.5)],
}


@pytest.mark.parametrize("strategies", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_another_model_is_refused_when_the_optimizer_is_made(change, message, strategies):
    """And by everything else that takes parameters by name."""
    adaptation = adapted(*strategies)
    change(adaptation.model)
    message = rf"the model has changed since adapt: {message}.*Call adapt again .* or change it before adapt"
    calls: list[Callable[[], object]] = [
        lambda: adaptation.optimizer(torch.optim.SGD, lr=0.1),
        lambda: adaptation.measure([(X, torch.zeros(8).long())] * 2),
        adaptation.penalty,
        adaptation.drift,
        lambda: adaptation.start,
        lambda: ctl.fit(adaptation, (X, torch.zeros(8).long()), training=ctl.Training(epochs=2, device="cpu")),
    ]
    for call in calls:
        with pytest.raises(ctl.SpecError, match=message):
            call()


@pytest.mark.parametrize("how", ["step", "pull"])
@pytest.mark.parametrize("strategies", [STRATEGIES["plain"], STRATEGIES["pull"], STRATEGIES["decoupled"]])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_another_model_is_refused_at_the_first_step(change, message, strategies, how):
    adaptation = adapted(*strategies)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    change(adaptation.model)
    before = {name: p.detach().clone() for name, p in adaptation.model.named_parameters()}
    adaptation.model(X).square().mean().backward()
    with pytest.raises(ctl.SpecError, match=f"the model has changed since adapt: {message}"):
        optimizer.step() if how == "step" else adaptation.pull()
    assert all(torch.equal(p, before[name]) for name, p in adaptation.model.named_parameters())


def test_a_head_of_the_same_shape_is_refused_if_the_old_one_was_copied():
    """Its names and shapes tell nothing, and the plan says ``source``; a fresh head may be another fresh head."""
    adaptation = adapted()
    other_head(adaptation.model)
    with pytest.raises(ctl.SpecError, match=r"'head\.weight', which came from the source, is in another module"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1)
    frozen = adapted(ctl.LayerTransfer(layers=["head"], side="output"))
    other_head(frozen.model)
    with pytest.raises(ctl.SpecError, match="which came from the source"):
        frozen.optimizer(torch.optim.SGD, lr=0.1)
    fresh = adapted(classes=5)
    fresh.model.head = nn.Linear(4, 5)
    step(fresh, fresh.optimizer(torch.optim.SGD, lr=0.1))
    late = adapted()
    optimizer = late.optimizer(torch.optim.SGD, lr=0.1)
    other_head(late.model)
    late.model(X).sum().backward()
    with pytest.raises(ctl.SpecError, match=r"steps another 'head\.weight' than the model has"):
        optimizer.step()


def test_a_parameter_replaced_after_the_optimizer_is_refused():
    adaptation = adapted(ctl.L2SP(alpha=0.1))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    adaptation.model.head.weight = nn.Parameter(adaptation.model.head.weight.detach().clone())
    adaptation.model(X).sum().backward()
    with pytest.raises(ctl.SpecError, match=r"another 'head\.weight' .* replaced after adaptation\.optimizer"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 2])
def test_half_precision_after_the_optimizer_is_refused_where_something_acts(dtype, steps):
    adaptation = adapted(ctl.L2SP(alpha=0.1))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(steps):
        step(adaptation, optimizer)
    adaptation.model.to(dtype)
    optimizer.zero_grad()
    with pytest.raises(ctl.SpecError, match=rf"'body\.0\.weight' is {dtype}.*float32"):
        optimizer.step()


def test_double_precision_is_no_change():
    """Anchors follow: the reference is the pull by hand."""
    adaptation = adapted(ctl.L2SP(alpha=0.5, on="all"))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    adaptation.model.double()
    start = adaptation.model.head.weight.detach().clone()
    with torch.no_grad():
        adaptation.model.head.weight.add_(1)
    optimizer.step()
    torch.testing.assert_close(adaptation.model.head.weight.detach(), start + 1 - 0.1 * 0.5)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def parts_compiled(model: nn.Module) -> nn.Module:
    model.body = torch.compile(model.body, backend="eager")
    return model


def same_values(model: nn.Module) -> nn.Module:
    model.head = copy.deepcopy(model.head)
    return model


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict(
        {name: t + 0.1 for name, t in model.state_dict().items() if t.ndim}, strict=False, assign=True
    )
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.body = checkpoint_wrapper(model.body)
    return model


WRAPPERS = {
    "nothing": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "a part compiled": parts_compiled,
    "checkpoints": checkpointed,
    "synchronised norms": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a copy of a module": same_values,
    "loaded by assignment": assigned,
    "moved": lambda model: model.to("cpu").to(memory_format=torch.channels_last),
    "double": lambda model: model.double().float(),
}


@pytest.mark.parametrize("strategies", [STRATEGIES["pull"], [ctl.LHUC()], [ctl.Mixout(p=0.0)]], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_legitimate_changes_work(wrapper, strategies):
    adaptation = adapted(*strategies)
    model = wrapper(adaptation.model).eval()
    if isinstance(strategies[0], ctl.LHUC) and wrapper in (WRAPPERS["synchronised norms"], same_values):
        # New norms lack their amplitudes, and whether a copy has the values of a frozen head is not known.
        with pytest.raises(ctl.SpecError, match="has changed since adapt"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)
        return
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        step(adaptation, optimizer, model)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    adaptation.drift()
    adaptation.penalty()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_has_the_model_it_was_copied_with(how):
    adaptation = adapted(ctl.L2SP(alpha=0.1))
    step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1))
    other = how(adaptation)
    step(other, other.optimizer(torch.optim.SGD, lr=0.1))


class TestConvertedNorms:
    """``convert_sync_batchnorm`` makes new modules around the same parameters."""

    X = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def adapted(*strategies: ctl.Strategy) -> ctl.Adaptation:
        model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        return ctl.adapt(model, copy.deepcopy(model.state_dict()), strategies)

    @pytest.mark.parametrize(
        "strategies",
        [[ctl.LayerTransfer(layers=1)], [ctl.NormAdaptation(train="all", statistics="instance")]],
        ids=["held", "extended"],
    )
    def test_before_the_optimizer_they_are_held_and_extended_again(self, strategies):
        """SyncBatchNorm needs a process group in train mode only, and a held norm is never in it."""
        adaptation = self.adapted(*strategies)
        expected = adaptation.model.eval()(self.X)
        nn.SyncBatchNorm.convert_sync_batchnorm(adaptation.model)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        norms = [module for module in adaptation.model.modules() if tracks_statistics(module)]
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        torch.testing.assert_close(adaptation.model(self.X), expected)
        adaptation.model[1].train()
        assert not adaptation.model[1].training
        step_on = adaptation.model(self.X).sum()
        step_on.backward()
        optimizer.step()

    @pytest.mark.parametrize(
        ("strategies", "what"),
        [
            ([ctl.LayerTransfer(layers=1)], "statistics held"),
            ([ctl.NormAdaptation(train="all", statistics="instance")], "NormAdaptation"),
        ],
    )
    def test_after_it_they_are_refused(self, strategies, what):
        adaptation = self.adapted(*strategies)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        nn.SyncBatchNorm.convert_sync_batchnorm(adaptation.model)
        adaptation.model.eval()(self.X).sum().backward()
        with pytest.raises(ctl.SpecError, match=rf"a norm of the model was replaced .*\(.*{what}.*before adaptation"):
            optimizer.step()

    def test_before_the_optimizer_a_later_phase_trains_them(self):
        """They carry parameters that ask for no gradient because the first phase froze them, not by hand."""
        adaptation = self.adapted(ctl.GradualUnfreezing(by="layer"))
        adaptation.model[0].requires_grad_(False)
        nn.SyncBatchNorm.convert_sync_batchnorm(adaptation.model)
        adaptation.optimizer(torch.optim.SGD, lr=0.1)
        assert not adaptation.model[1].weight.requires_grad
        adaptation.start_phase(len(adaptation.plan.phases) - 1)
        assert adaptation.model[1].weight.requires_grad
        assert adaptation.model[1].bias.requires_grad

    def test_after_it_they_are_fine_if_nothing_was_done_to_them(self):
        adaptation = self.adapted()
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        nn.SyncBatchNorm.convert_sync_batchnorm(adaptation.model)
        adaptation.model.eval()(self.X).sum().backward()
        optimizer.step()


class TestTappedModules:
    """A layer that is put into another module around the same parameters still has features."""

    @staticmethod
    def adapted() -> ctl.Adaptation:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))
        taps = ctl.FeatureConservation(layers=["0"], alpha=1.0, attention=False)
        adaptation = ctl.adapt(model, copy.deepcopy(model.state_dict()), [taps], layers=["0", "2"])
        with torch.no_grad():
            model[0][0].bias.add_(2)
        return adaptation

    @staticmethod
    def replace(model: nn.Module) -> None:
        linear = nn.Linear(4, 4)
        linear.weight, linear.bias = model[0][0].weight, model[0][0].bias
        model[0] = nn.Sequential(linear)

    def test_before_the_optimizer_the_new_one_is_tapped(self):
        values = []
        for change in (lambda model: None, self.replace):
            adaptation = self.adapted()
            change(adaptation.model)
            adaptation.optimizer(torch.optim.SGD, lr=0.1)
            outputs = adaptation.model(X)
            loss = outputs.square().mean()
            values.append((adaptation.loss(loss, outputs, X) - loss).item())
        assert values[0] > 1
        assert values[1] == pytest.approx(values[0])

    def test_after_it_another_is_refused(self):
        adaptation = self.adapted()
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        self.replace(adaptation.model)
        outputs = adaptation.model(X)
        adaptation.loss(outputs.square().mean(), outputs, X).backward()
        with pytest.raises(ctl.SpecError, match=r"the module '0.*whose features or inputs are compared, was replaced"):
            optimizer.step()
