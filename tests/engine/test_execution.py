"""How a run computes: decided once, said in the result, the same result up to rounding, refused where it cannot be."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.batches import take_rows
from conservtl.compat import tf32_settings
from conservtl.engine.execution import Execution, _no_fused, decide, in_tf32
from conservtl.engine.stored_weights import channels_last, follow_layout
from conservtl.errors import SpecError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAST = torch.channels_last


class Pictures(nn.Module):
    """Two convolutions with batch norm and a head, on (N, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean((-2, -1)))


class Branching(nn.Module):
    """A module whose path depends on its values."""

    def forward(self, inputs):
        return inputs.relu() if inputs.sum() > 0 else inputs


def pictures():
    torch.manual_seed(0)
    return Pictures()


DATA = (
    torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
    torch.arange(12) % 3,
)


def trained(*strategies, resumed_in=None, **settings):
    adaptation = ctl.adapt(pictures(), copy.deepcopy(pictures()), strategies)
    fields = {"epochs": 2, "batch_size": 4, "lr": 0.01, "optimizer": "sgd", "device": "cpu", **settings}
    result = ctl.fit(adaptation, DATA, training=ctl.Training(**fields), seed=1, out=resumed_in)
    return adaptation.model, result


def close(a, b, rtol=1e-4, atol=1e-5):
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile traces and runs what it traced, without a compiler of machine code."""
    real = torch.compile
    modes = []

    def compile_(model, **options):
        if "mode" not in options:
            return real(model, **options)
        modes.append(options.pop("mode"))
        return real(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    yield modes
    torch.compiler.reset()


class TestDecisions:
    def decided(self, model=None, device=CPU, precision="fp32", made=None, **settings):
        training = ctl.Training(**settings)
        return decide(training, model or pictures(), device, precision, made or training.make())

    def test_auto_is_off_on_a_cpu(self):
        assert self.decided() == Execution("cpu", "fp32")

    def test_auto_on_cuda_is_the_layout_for_convolutions_and_tf32_under_coarser_precision(self, monkeypatch):
        monkeypatch.setattr("conservtl.engine.execution._no_fused", lambda *_: None)
        assert self.decided(device=CUDA, precision="bf16") == Execution("cuda", "bf16", True, True, tf32=True)
        found = self.decided(nn.Linear(2, 2), device=CUDA)
        assert found == Execution("cuda", "fp32", channels_last=False, fused=True, tf32=None)
        off = {"channels_last": False, "fused": False, "tf32": False}
        assert self.decided(device=CUDA, precision="bf16", **off) == Execution("cuda", "bf16", tf32=False)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
    def test_transposed_scripted_and_own_convolutions_count(self):
        own = nn.ParameterDict({"weight": torch.zeros(2, 2, 1, 1)})
        for model in (nn.ConvTranspose2d(2, 2, 1), torch.jit.script(nn.Conv2d(2, 2, 1)), own):
            assert self.decided(model, channels_last=True).channels_last
        assert not self.decided(own, device=CUDA, fused=False).channels_last

    @pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
    def test_optimizers_of_the_settings_have_a_fused_step_on_a_cpu(self, optimizer):
        assert self.decided(optimizer=optimizer, fused=True).fused

    def test_auto_leaves_an_optimizer_without_a_fused_step_alone(self, monkeypatch):
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # as if on cuda
        for cls in (torch.optim.RMSprop, partial(torch.optim.SGD, foreach=True), partial(torch.optim.SGD, fused=False)):
            assert not self.decided(device=CUDA, made=(cls, {"lr": 0.1})).fused
        assert self.decided(device=CUDA, made=(torch.optim.AdamW, {"lr": 0.1})).fused

    def test_they_are_said_in_words(self):
        assert str(Execution("cpu", "fp32")) == "cpu, fp32"
        execution = Execution("cuda:0", "bf16", True, True, "max-autotune", True, 64, 2)
        assert str(execution) == (
            "cuda:0, channels-last, fused, compiled (max-autotune), tf32, bf16, batches of 64, 2 batches a step"
        )

    def test_the_result_says_them(self):
        _, result = trained(channels_last=True, fused=True, accumulate=2)
        assert result.execution == "cpu, channels-last, fused, fp32, batches of 4, 2 batches a step"
        assert "channels-last" in result._repr_html_()
        adaptation = ctl.adapt(pictures(), pictures(), [])
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA), 6)
        assert ctl.fit(adaptation, loader, training=ctl.Training(epochs=1, device="cpu")).execution == "cpu, fp32"


class TestRefused:
    def fit(self, model, data, optimizer=None, **settings):
        adaptation = ctl.adapt(model, copy.deepcopy(model), [])
        before = copy.deepcopy(model.state_dict())
        training = ctl.Training(epochs=1, device="cpu", **settings)
        try:
            ctl.fit(adaptation, data, training=training, optimizer=optimizer)
        finally:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_channels_last_without_a_convolution(self):
        model = nn.Linear(4, 2)
        with pytest.raises(SpecError, match=r"channels_last is true.*Linear has none.*auto or false"):
            self.fit(model, (torch.randn(4, 4), torch.zeros(4, dtype=torch.long)), channels_last=True)

    def test_channels_last_with_convolutions_of_other_dimensions(self, net, data):
        with pytest.raises(SpecError, match="2-D convolutions; Net has none"):
            self.fit(net(), data, channels_last=True)

    def test_fused_with_an_optimizer_that_has_none(self):
        with pytest.raises(SpecError, match="RMSprop takes no fused"):
            self.fit(pictures(), DATA, torch.optim.RMSprop, fused=True)

    def test_fused_with_arguments_that_exclude_it(self):
        with pytest.raises(SpecError, match=r"training.fused is true, but .*AdamW makes no fused step on cpu"):
            self.fit(pictures(), DATA, partial(torch.optim.AdamW, foreach=True), fused=True)
        with pytest.raises(SpecError, match=r"makes no fused step on cpu: .*differentiable"):
            self.fit(pictures(), DATA, partial(torch.optim.AdamW, differentiable=True), fused=True)

    @pytest.mark.parametrize(
        ("kind", "cls"),
        [(torch.complex64, torch.optim.AdamW), (torch.complex64, torch.optim.Adagrad), ("sparse", torch.optim.SGD)],
    )
    def test_fused_for_a_model_that_it_does_not_take(self, kind, cls):
        """Auto leaves such a model to the plain step, also on a GPU."""

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(4, 4, sparse=kind == "sparse", dtype=None if kind == "sparse" else kind)
                self.head = nn.Linear(4, 2)

            def forward(self, places):
                return self.head(self.table(places).abs())

        data = torch.arange(8) % 4, torch.arange(8) % 2
        assert _no_fused(cls, {"lr": 0.1}, CPU, Odd()) is not None
        with pytest.raises(SpecError, match=rf"{cls.__name__} makes no fused step on cpu: .*(sparse|complex)"):
            self.fit(Odd(), data, cls, fused=True)

    def test_tf32_without_cuda(self):
        with pytest.raises(SpecError, match=r"training.tf32 is true.*this run is on a CPU"):
            self.fit(pictures(), DATA, tf32=True)

    def test_a_model_that_cannot_be_traced_by_the_name_of_its_module(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Branching()), nn.Linear(4, 2))
        with pytest.raises(SpecError, match=r"compile is true.*its module '1.1' \(Branching\) cannot be traced"):
            self.fit(model, (torch.randn(8, 4), torch.arange(8) % 2), compile=True)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
    def test_a_scripted_module(self):
        model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
        with pytest.raises(SpecError, match=r"its module '1' .* cannot be traced: a scripted module is compiled"):
            self.fit(model, (torch.randn(8, 4), torch.arange(8) % 2), compile="default")

    @pytest.mark.parametrize(
        "fields",
        [{"compile": "fast"}, {"fused": "yes please"}, {"channels_last": "nchw"}, {"tf32": "high"}],
    )
    def test_values_that_are_none(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ctl.Training(**fields)


class TestChannelsLast:
    def test_the_weights_are_those_of_the_plain_run(self):
        plain, _ = trained(ctl.L2SP(alpha=0.1))
        laid_out, _ = trained(ctl.L2SP(alpha=0.1), channels_last=True)
        close(laid_out, plain)
        assert all(tensor.is_contiguous() for tensor in laid_out.state_dict().values())

    def test_model_source_model_and_features_are_in_it(self):
        seen = []
        model = pictures()
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.FeatureConservation(), ctl.OutputConservation()])
        source = adaptation.bound.terms.source_model.model

        def loss(outputs, batch):
            seen.append(
                [one.weight.is_contiguous(memory_format=LAST) for one in (model.stem[0], model.body[0], source.stem[0])]
            )
            return F.cross_entropy(outputs, batch[1])

        hook = model.body.register_forward_hook(lambda _, __, y: seen.append([y.is_contiguous(memory_format=LAST)]))
        training = ctl.Training(epochs=1, batch_size=4, channels_last=True, device="cpu")
        ctl.fit(adaptation, DATA, training=training, loss=loss, seed=0)
        hook.remove()
        assert all(all(one) for one in seen[1:])  # the first is of the check before training
        assert source.stem[0].weight.is_contiguous()

    def test_a_model_found_in_it_stays_in_it(self):
        model = pictures().to(memory_format=LAST)
        training = ctl.Training(epochs=1, batch_size=4, channels_last=True, device="cpu")
        ctl.fit(ctl.adapt(model, pictures(), []), DATA, training=training)
        assert model.stem[0].weight.is_contiguous(memory_format=LAST)

    def test_strides_come_back_after_an_error(self):
        model = pictures()

        def laid_out():
            with channels_last([model]):
                assert model.body[0].weight.stride() == (36, 1, 12, 4)
                raise KeyError

        with pytest.raises(KeyError):
            laid_out()
        assert model.body[0].weight.stride() == (36, 9, 3, 1)

    def test_kept_outputs_of_a_frozen_side_keep_it(self):
        plain, result = trained(ctl.LayerTransfer(side="input", layers=1), batch_norm="eval")
        laid_out, other = trained(ctl.LayerTransfer(side="input", layers=1), batch_norm="eval", channels_last=True)
        assert result.kept_outputs
        assert other.kept_outputs
        close(laid_out, plain)

    def test_rows_keep_the_layout_of_their_tensor(self):
        images, index = torch.randn(5, 3, 2, 2).contiguous(memory_format=LAST), torch.tensor([4, 0, 4])
        rows = take_rows(images, index)
        assert rows.is_contiguous(memory_format=LAST)
        assert torch.equal(rows, images[index])
        assert torch.equal(take_rows(images.contiguous(), index), images[index])

    def test_a_run_in_one_layout_resumes_in_the_other(self, tmp_path):
        """The optimizer's state follows the layout of its parameters, which a fused step takes for granted."""

        def run(epochs, resume, **settings):
            adaptation = ctl.adapt(pictures(), copy.deepcopy(pictures()), [])
            training = ctl.Training(
                epochs=2, batch_size=4, lr=0.01, optimizer="sgd", device="cpu", fused=True, **settings
            )

            def stop(line):
                if line["epoch"] == epochs:
                    raise InterruptedError

            with suppress(InterruptedError):
                ctl.fit(adaptation, DATA, training=training, seed=1, out=tmp_path, resume=resume, tell=stop)
            return adaptation.model

        whole, _ = trained(fused=True)
        run(1, resume=False, channels_last=True)
        close(run(3, resume=True, channels_last=False), whole)

    def test_state_follows(self):
        weight = nn.Parameter(torch.randn(2, 3, 2, 2).contiguous(memory_format=LAST))
        optimizer = torch.optim.Adam([weight])
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        moment = optimizer.state[weight]["exp_avg"].clone()
        optimizer.state[weight]["exp_avg"] = moment.contiguous()
        follow_layout(optimizer)
        assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
        assert torch.equal(optimizer.state[weight]["exp_avg"], moment)


class TestCompiled:
    @pytest.mark.parametrize(
        "strategies",
        [
            [ctl.LPFT(epochs=1), ctl.L2SP(alpha=0.1, on="all")],
            [ctl.FeatureConservation(), ctl.OutputConservation()],
            [ctl.LayerTransfer(side="input", layers=1)],
        ],
        ids=["phases", "features and outputs", "a frozen side kept"],
    )
    def test_the_weights_are_those_of_the_plain_run(self, strategies, eager_compiler):
        plain, result = trained(*strategies, batch_norm="eval")
        compiled, other = trained(*strategies, batch_norm="eval", compile=True)
        assert eager_compiler == [None]
        close(compiled, plain)
        assert other.kept_outputs == result.kept_outputs
        assert "compiled" in other.execution

    def test_a_mode_and_other_settings_with_it(self, eager_compiler):
        settings = {"accumulate": 2, "clip": 0.1, "precision": "bf16"}
        plain, _ = trained(ctl.FeatureConservation(), **settings)
        compiled, result = trained(ctl.FeatureConservation(), compile="reduce-overhead", channels_last=True, **settings)
        assert eager_compiler == ["reduce-overhead"]
        assert result.execution.startswith("cpu, channels-last, compiled (reduce-overhead), bf16")
        close(compiled, plain, rtol=5e-2, atol=2e-3)
        assert "forward" not in vars(compiled)

    def test_evaluations_run_the_model_as_it_is(self, eager_compiler):
        traced = []
        adaptation = ctl.adapt(pictures(), pictures(), [])

        def forward(model, batch):
            traced.append((model.training, type(model).__name__))
            return model(batch[0])

        training = ctl.Training(epochs=1, batch_size=4, compile=True, device="cpu")
        ctl.fit(adaptation, DATA, {"target": DATA}, training, forward=forward)
        assert {name for mode, name in traced if mode} == {"OptimizedModule"}
        assert {name for mode, name in traced if not mode} == {"Pictures"}


class TestTF32:
    def states(self):
        return [get() for get, _ in tf32_settings()]

    @pytest.mark.parametrize("active", [True, False])
    def test_torchs_settings_come_back(self, active):
        before = self.states()
        with in_tf32(active):
            assert self.states() == [active, active]
        assert self.states() == before

    def test_none_leaves_them(self):
        before = self.states()
        with in_tf32(None):
            assert self.states() == before

    def test_the_newer_settings_of_torch_are_respected(self):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            with in_tf32(active=False):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = "none"
