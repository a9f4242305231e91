"""Export: a plain model of every strategy, with the same outputs, for programs that know nothing of conservtl."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.compat import hook_tables, load_hook_tables
from conservtl.methods import builtin_strategies


class Images(nn.Module):
    """Two convolutions with norms and a head, on (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Speech(nn.Module):
    """A recurrent layer between two linear maps, on (N, frames, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(5, 6)
        self.recurrent = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.front(x))[0][:, -1])


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FRAMES = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

STRATEGIES: dict[str, Any] = {
    "fine-tuning": [],
    "L2SP": [ctl.L2SP()],
    "L1SP": [ctl.L1SP()],
    "GroupLassoSP": [ctl.GroupLassoSP()],
    "FisherSP": [ctl.FisherSP()],
    "LayerTransfer": [ctl.LayerTransfer(side="input", layers=1)],
    "DiscriminativeLR": [ctl.DiscriminativeLR(decay=0.5)],
    "GradualUnfreezing": [ctl.GradualUnfreezing(epochs=1)],
    "LPFT": [ctl.LPFT()],
    "FeatureExtraction": [ctl.FeatureExtraction()],
    "FeatureExtraction(ncm)": [ctl.FeatureExtraction(classifier="ncm")],
    "FeatureExtraction(layers)": [ctl.FeatureExtraction(layers=("stem", "body", "head"))],
    "OutputConservation": [ctl.OutputConservation(weight=1.0)],
    "FeatureConservation": [ctl.FeatureConservation(layers=("body",))],
    "WeightInterpolation": [ctl.WeightInterpolation(t=0.5)],
    "Mixout": [ctl.Mixout(p=0.5)],
    "SelectiveDecay": [ctl.SelectiveDecay()],
    "SpectralShrinkage": [ctl.SpectralShrinkage()],
    "EntropyMinimisation": [ctl.EntropyMinimisation()],
    "SurgicalFineTuning": [ctl.SurgicalFineTuning(block="stem")],
    "AutoRGN": [ctl.AutoRGN()],
    "Projection": [ctl.Projection(radius=0.5)],
    "LHUC": [ctl.LHUC()],
    "LoRA": [ctl.LoRA(rank=1), ctl.WeightInterpolation(t=0.5)],
    "InputTransform": [ctl.InputTransform(dim=1)],
    "NormAdaptation": [ctl.NormAdaptation()],
    "NormAdaptation(instance)": [ctl.NormAdaptation(statistics="instance", prior=3)],
    "all at once": [
        ctl.L2SP(), ctl.Mixout(p=0.2), ctl.LHUC(freeze=False), ctl.InputTransform(dim=1, freeze=False),
        ctl.OutputConservation(weight=1.0), ctl.NormAdaptation(statistics="instance", prior=1),
    ],
}  # fmt: skip


def trained(network: Any, x: torch.Tensor, strategies: list, *, example: bool = True) -> ctl.Adaptation:
    """Return an adaptation after an epoch or two of training; every parameter that is trained has moved."""
    torch.manual_seed(0)
    source, model = network(), network()
    adaptation = ctl.adapt(model, source, strategies, example=x if example else None)
    epochs = max(2, len(adaptation.plan.phases))
    ctl.fit(adaptation, (x, LABELS), training=ctl.Training(epochs=epochs, batch_size=3, lr=0.05, optimizer="sgd"))
    return adaptation


def assert_plain(model: nn.Module) -> None:
    """Nothing of conservtl is left in the model."""
    for name, module in model.named_modules():
        assert not type(module).__module__.startswith("conservtl"), (name, type(module))
        for table in (*hook_tables(module), *load_hook_tables(module)):
            assert not table, name
        own = [key for key, value in vars(module).items() if type(value).__module__.startswith("conservtl")]
        assert not own, (name, own)
    assert not model.training


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


def test_no_strategy_is_missing_here():
    here = {type(strategy).__name__ for strategies in STRATEGIES.values() for strategy in strategies}
    assert here >= set(builtin_strategies())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(name):
    """The same outputs, from a pickle and a state dict too, and through torch.export."""
    adaptation = trained(Images, IMAGES, STRATEGIES[name])
    expected = outputs(adaptation.model, IMAGES)
    before = {key: value.clone() for key, value in adaptation.model.state_dict().items()}
    plain = adaptation.export()
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(plain, (IMAGES,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(IMAGES[:4]), expected[:4], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in adaptation.model.state_dict().items())


def test_a_transform_that_cannot_be_merged_stands_in_front():
    """Without an example nothing tells which module takes the input."""
    adaptation = trained(Images, IMAGES, [ctl.InputTransform(dim=1)], example=False)
    plain = adaptation.export()
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, IMAGES), outputs(adaptation.model, IMAGES), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in plain.named_children()] == ["input_transform", "model"]


def test_in_front_of_a_model_with_further_arguments():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, scale: float = 2.0, *, shift: float = 0.0) -> torch.Tensor:
            return self.head(scale * self.front(x).relu()) + shift

    adaptation = ctl.adapt(Two(), Two(), [ctl.InputTransform(dim=-1)])
    torch.nn.init.normal_(adaptation.model.input_transform.weight)
    plain = adaptation.export()
    assert_plain(plain)
    for arguments in ({}, {"scale": 3.0}, {"scale": 3.0, "shift": 1.0}):
        torch.testing.assert_close(plain(FRAMES, **arguments), adaptation.model(FRAMES, **arguments))


def test_in_a_sequence_it_is_the_first_module():
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))

    adaptation = trained(network, IMAGES, [ctl.InputTransform(dim=1)], example=False)
    plain = adaptation.export()
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, IMAGES), outputs(adaptation.model, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")  # of any LSTM
def test_amplitudes_of_a_recurrent_layer_scale_its_outputs():
    adaptation = trained(Speech, FRAMES, [ctl.LHUC()])
    plain = adaptation.export()
    assert_plain(plain)
    expected = outputs(adaptation.model, FRAMES)
    torch.testing.assert_close(outputs(plain, FRAMES), expected, rtol=1e-5, atol=1e-5)
    program = torch.export.export(plain, (FRAMES,))
    torch.testing.assert_close(program.module()(FRAMES), expected, rtol=1e-5, atol=1e-5)


def test_amplitudes_of_a_shared_weight():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).relu()).relu()).mean(1)

    adaptation = trained(Shared, FRAMES, [ctl.LHUC()])
    plain = adaptation.export()
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, FRAMES), outputs(adaptation.model, FRAMES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_norms_of_each_example_on_vectors_and_sequences(ndim):
    """With one value a channel the kept statistics act alone."""
    x = FRAMES.transpose(1, 2) if ndim == 3 else FRAMES[:, 0]

    def network() -> nn.Module:
        front = [nn.Conv1d(5, 6, 1) if ndim == 3 else nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()]
        return nn.Sequential(*front, *([nn.AdaptiveAvgPool1d(1), nn.Flatten()] if ndim == 3 else []), nn.Linear(6, 3))

    adaptation = trained(network, x, [ctl.NormAdaptation(statistics="instance", prior=1)])
    plain = adaptation.export()
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, x), outputs(adaptation.model, x), rtol=1e-5, atol=1e-5)


def test_norms_that_leave_out_padding_are_refused():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.norm, self.head = nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            return self.head(self.norm(self.front(x)).mean(2))

    strategies = [ctl.NormAdaptation(statistics="instance", prior=1)]
    adaptation = ctl.adapt(Padded(), Padded(), strategies)
    with pytest.raises(ctl.SpecError, match=r"norms of Padded leave out the padding .*padding='count'"):
        adaptation.export()


def test_a_head_from_layers_of_a_model_that_cannot_be_traced_is_refused():
    class Branching(Images):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else x + 1)

    adaptation = trained(Branching, IMAGES, [ctl.FeatureExtraction(layers=("stem",))])
    with pytest.raises(ctl.SpecError, match=r"torch\.fx to trace the model, and it cannot"):
        adaptation.export()


def test_parameters_that_the_user_froze_stay_frozen():
    source, model = Images(), Images()
    model.stem.requires_grad_(False)
    plain = ctl.adapt(model, source, [ctl.LayerTransfer(side="input", layers=2)]).export()
    assert not any(parameter.requires_grad for parameter in plain.stem.parameters())
    assert all(parameter.requires_grad for parameter in plain.body.parameters())
    plain.train()
    assert plain.stem[1].training  # no norm is held


def test_a_user_s_hooks_stay():
    source, model = Images(), Images()
    model.body.register_forward_hook(_halve)
    adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(layers=("body",)), ctl.Mixout()])
    plain = adaptation.export()
    assert list(plain.body._forward_hooks.values()) == [_halve]
    torch.testing.assert_close(outputs(plain, IMAGES), outputs(model, IMAGES))


def _halve(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def test_an_adapter_is_merged_and_unloaded():
    peft = pytest.importorskip("peft")
    from conservtl.integrations.peft import adapt

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["stem.0", "head"], init_lora_weights=False)
    adaptation = adapt(peft.get_peft_model(Images(), config), [ctl.L2SP(), ctl.OutputConservation(weight=1.0)])
    plain = adaptation.export()
    assert type(plain) is Images
    assert_plain(plain)
    torch.testing.assert_close(outputs(plain, IMAGES), outputs(adaptation.model, IMAGES), rtol=1e-5, atol=1e-5)


def sequence() -> nn.Module:
    """A model of torch's modules alone, so that a pickle of it needs no code of these tests."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))


def test_it_loads_where_conservtl_is_not_installed(python, tmp_path):
    kept = {}
    cases = {
        "merged": [ctl.LHUC(), ctl.L2SP(on="all")],
        "instance": [ctl.NormAdaptation(statistics="instance", prior=1)],
        "transform": [ctl.InputTransform(dim=1)],
        "layers": [ctl.FeatureExtraction(layers=("0", "4"))],
        "hooks": [ctl.Mixout(), ctl.FeatureConservation(layers=("0",)), ctl.LayerTransfer(side="input", layers=1)],
    }
    for name, strategies in cases.items():
        adaptation = trained(sequence, IMAGES, strategies, example=name != "transform")
        torch.save(adaptation.export(), tmp_path / f"{name}.pt")
        kept[name] = outputs(adaptation.model, IMAGES)
    torch.save((IMAGES, kept), tmp_path / "outputs.pt")
    code = """
        import sys, torch
        names = {"conservtl", *(name for name in sys.modules if name.startswith("conservtl."))}
        sys.modules.update(dict.fromkeys(names))
        x, kept = torch.load("outputs.pt")
        for name, expected in kept.items():
            model = torch.load(f"{name}.pt", weights_only=False)
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        print(len(kept), "loaded")
    """
    done = python("-c", textwrap.dedent(code), folder=tmp_path)
    assert done.stdout.strip() == f"{len(cases)} loaded", done.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", STRATEGIES)
def test_torchscript(name):
    adaptation = trained(Images, IMAGES, STRATEGIES[name])
    plain = adaptation.export()
    traced = torch.jit.trace(plain, (IMAGES,))
    torch.testing.assert_close(traced(IMAGES[:4]), outputs(plain, IMAGES[:4]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("LHUC", "NormAdaptation(instance)", "all at once")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in STRATEGIES
    ],
)
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    adaptation = trained(Images, IMAGES, STRATEGIES[name])
    plain = adaptation.export()
    torch.onnx.export(plain, (IMAGES,), tmp_path / "model.onnx", dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(plain, IMAGES), rtol=1e-5, atol=1e-5)


def test_it_can_be_trained_by_hand():
    """Gradients reach every parameter: nothing is detached or frozen."""
    plain = trained(Images, IMAGES, STRATEGIES["all at once"]).export()
    F.cross_entropy(plain(IMAGES), LABELS).backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
