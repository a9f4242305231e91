"""Device, precision and settings; the user's objects are restored after a run."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

ONCE = {"epochs": 1, "batch_size": 16, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_state():
    """Clear Accelerate's shared state before and after each test."""
    states = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    for state in states:
        state.clear()
    yield
    for state in states:
        state.clear()


def test_bf16_on_a_cpu(plain, data):
    """Autocast computes in bf16, parameters and their updates stay fp32."""
    adaptation = plain(ctl.L2SP(alpha=0.01))
    kinds = set()

    def loss(outputs, batch):
        kinds.add(outputs.dtype)
        return F.cross_entropy(outputs, batch[1])

    hook = adaptation.model.stem.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    result = ctl.fit(adaptation, data, training=ctl.Training(**ONCE, precision="bf16"), loss=loss)
    hook.remove()
    assert kinds == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in adaptation.model.parameters()} == {torch.float32}
    assert (result.precision, result.device) == ("bf16", "cpu")
    assert adaptation.model(data[0]).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_fp16_on_a_cpu(plain, data):
    """Autocast computes in fp16, the loss is scaled, the pull of L2-SP is not."""
    results = {}
    for precision in ("fp32", "fp16"):
        adaptation = plain(ctl.L2SP(alpha=1.0))
        kinds = set()
        hook = adaptation.model.stem.register_forward_hook(lambda _, __, out, kinds=kinds: kinds.add(out.dtype))
        training = ctl.Training(**{**ONCE, "epochs": 3}, precision=precision, clip=1.0)
        result = ctl.fit(adaptation, data, training=training, seed=0)
        hook.remove()
        assert result.precision == precision
        assert kinds == {torch.float16 if precision == "fp16" else torch.float32}
        results[precision] = torch.cat([one.detach().flatten() for one in adaptation.model.parameters()])
    assert (results["fp16"] - results["fp32"]).abs().max() < 0.02
    assert not torch.equal(results["fp16"], results["fp32"])


def test_an_accelerator_that_would_leave_out_fp16_is_refused(plain, data):
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    try:
        with pytest.raises(ctl.SpecError, match="mixed_precision is fp16, which Accelerate leaves out on a CPU"):
            ctl.fit(plain(), data, training=ctl.Training(**ONCE), accelerator=accelerator)
    finally:
        accelerator.state._mixed_precision = "no"


def test_cuda_needs_a_gpu(plain, data):
    with pytest.raises(ctl.SpecError, match="device is cuda, but torch finds no GPU"):
        ctl.fit(plain(), data, training=ctl.Training(device="cuda"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_the_model_is_left_as_found(plain, data, precision, ends):
    """Methods, modes and attributes are restored, also after a run that fails."""
    adaptation = plain()
    model = adaptation.model
    model.body.eval()
    attributes = {module: set(module.__dict__) for module in model.modules()}
    modes = [module.training for module in model.modules()]

    def loss(outputs, batch):
        if ends == "badly":
            raise RuntimeError("out of patience")
        return F.cross_entropy(outputs, batch[1])

    try:
        ctl.fit(adaptation, data, {"target": data}, ctl.Training(**ONCE, precision=precision), loss=loss)
    except RuntimeError as error:
        assert str(error) == "out of patience"  # noqa: PT017
    assert {module: set(module.__dict__) for module in model.modules()} == attributes
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    copy.deepcopy(model)(data[0])


def test_a_forward_of_the_users_own_stays(plain, data):
    """A forward set on the object instead of the class."""
    adaptation = plain()
    calls = []
    original = adaptation.model.forward
    adaptation.model.forward = own = lambda inputs: (calls.append(1), original(inputs))[1]
    ctl.fit(adaptation, data, training=ctl.Training(**ONCE, precision="bf16"))
    assert adaptation.model.forward is own
    assert calls


def test_accelerates_state_is_left_as_found(plain, data):
    """Other settings of Accelerate in the same process are unchanged after fit."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    before = [dict(kind._shared_state) for kind in (AcceleratorState, GradientState, PartialState)]
    result = ctl.fit(plain(), data, training=ctl.Training(**ONCE, precision="fp32"))
    assert result.precision == "fp32"
    assert [dict(kind._shared_state) for kind in (AcceleratorState, GradientState, PartialState)] == before
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_accumulation_steps == 4


def test_your_own_accelerator(plain, data, same):
    """It decides device and precision, and holds no prepared objects afterwards."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    ours, theirs = plain(), plain()
    result = ctl.fit(ours, data, training=ctl.Training(**ONCE), accelerator=accelerator, seed=1)
    assert result.precision == "bf16"
    assert not accelerator._models
    assert not accelerator._optimizers
    ctl.fit(theirs, data, training=ctl.Training(**ONCE, precision="bf16"), seed=1)
    assert same(ours.model, theirs.model)


def test_an_accelerator_that_accumulates_is_refused(plain, data):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ctl.SpecError, match=r"gradient_accumulation_steps is 2.*set training\.accumulate"):
        ctl.fit(plain(), data, accelerator=accelerator)


@pytest.mark.parametrize("found", [(False, False), (True, True), (True, False)])
def test_determinism_is_asked_for_while_training_only(plain, data, found):
    torch.use_deterministic_algorithms(found[0], warn_only=found[1])
    try:
        seen = set()

        def loss(outputs, batch):
            seen.add(
                (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
            )
            return F.cross_entropy(outputs, batch[1])

        ctl.fit(plain(), data, training=ctl.Training(**ONCE, deterministic=True), loss=loss)
        assert seen == {(True, False)}
        now = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        assert now == found
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_failure_to_begin_leaves_everything_as_found(plain, data):
    """The optimizer cannot be made: weight decay on parameters that L2-SP already pulls."""
    adaptation = plain(ctl.L2SP(alpha=0.1))
    training = ctl.Training(**ONCE, weight_decay=0.1, deterministic=True)
    with pytest.raises(ctl.SpecError, match="weight_decay"):
        ctl.fit(adaptation, data, training=training)
    assert not torch.are_deterministic_algorithms_enabled()
    assert PartialState._shared_state == {}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_fused_equals_plain_to_rounding(data, optimizer):
    """One kernel for all weights, and the pull with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))
    ours = ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP(alpha=1.0)])
    theirs = copy.deepcopy(ours)
    for adaptation, fused in ((ours, True), (theirs, False)):
        training = ctl.Training(**ONCE, optimizer=optimizer, lr=0.01, fused=fused)
        ctl.fit(adaptation, data, training=training, seed=1)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_bar_writes_metrics_as_it_is_told(plain, data, capsys, monkeypatch):
    """No metric is special: a function of the caller writes all."""
    monkeypatch.setenv("COLUMNS", "200")
    settings = ctl.Training(**ONCE, evaluate_every=1)
    holdout = ctl.Holdout(data, metrics=lambda *_: {"accuracy": 0.25, "wer": 0.5})
    ctl.fit(plain(), data, {"target": holdout}, settings, progress=True)
    assert "target accuracy 0.250  target wer 0.500" in capsys.readouterr().err
    ctl.fit(plain(), data, {"target": holdout}, settings, progress=lambda name, value: f"{name.upper()}={value:.0%}")
    assert "target ACCURACY=25%  target WER=50%" in capsys.readouterr().err


def test_the_bar_goes_to_stderr(plain, data, capsys):
    """Rate and both metrics; standard output stays free for results."""
    ctl.fit(plain(), data, {"target": data, "source": data}, ctl.Training(**ONCE, evaluate_every=1), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "4/4" in shown.err
    assert "target" in shown.err
