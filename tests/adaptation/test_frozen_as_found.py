"""A parameter that asks for no gradient when it is handed in stays as it is, and the plan says so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import conservtl as ctl

STEPS = 3
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """Four linear layers: three of the body, and the head."""
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def handed_in(*frozen: int) -> nn.Sequential:
    """The network with these layers frozen by hand."""
    model = network()
    for layer in frozen:
        model[layer].requires_grad_(False)
    return model


def source(model: nn.Module, shift: float = 0.1) -> dict[str, torch.Tensor]:
    """Weights other than the model's own."""
    return {name: t + shift if t.is_floating_point() else t for name, t in model.state_dict().items()}


def train(adaptation: ctl.Adaptation, optimizer: torch.optim.Optimizer | None = None, x: torch.Tensor = X) -> None:
    """A loop by hand that goes through all phases."""
    optimizer = optimizer or adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    adaptation.model.train()
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        for _ in range(STEPS):
            optimizer.zero_grad()
            outputs = adaptation.model(x)
            adaptation.loss(outputs.square().mean(), outputs, x).backward()
            optimizer.step()


def moved(adaptation: ctl.Adaptation, start: dict[str, torch.Tensor]) -> set[int]:
    """The layers whose weights are no longer those of the start."""
    after = adaptation.model.state_dict()
    return {int(name.split(".")[0]) for name in start if not torch.equal(after[name], start[name])}


WAYS = {
    "plain": ([], {2, 3}),
    "a pull on all": ([ctl.L2SP(alpha=0.1, on="all", mode="decoupled")], {2, 3}),
    "a linear probe first": ([ctl.LPFT(epochs=1)], {2, 3}),
    "layer by layer": ([ctl.GradualUnfreezing(by="layer")], {2, 3}),
    "a stage of everything": ([ctl.GradualUnfreezing(phases=[{"train": ["*"]}])], {2, 3}),
    "a stage that names a layer": (
        [ctl.GradualUnfreezing(phases=[{"train": ["3"], "epochs": 1}, {"train": ["1", "3"]}])],
        {1, 3},
    ),
    "rates by name": ([ctl.DiscriminativeLR(groups={"0": 0.5})], {2, 3}),
    "layers by number": ([ctl.LayerTransfer(layers=2, freeze=False)], {2, 3}),
    "layers by name": ([ctl.LayerTransfer(layers=["1"], freeze=False)], {1, 2, 3}),
    "all layers": ([ctl.LayerTransfer(layers=["*"], freeze=False)], {2, 3}),
    "named and frozen": ([ctl.LayerTransfer(layers=["1"]), ctl.SurgicalFineTuning(block="1", head=True)], {3}),
    "a block by name": ([ctl.SurgicalFineTuning(block="1")], {1}),
    "a block by name, of two": ([ctl.SurgicalFineTuning(block="[12]")], {1, 2}),
    "a block by position": ([ctl.SurgicalFineTuning(block=0, head=True)], {3}),
    "feature extraction": ([ctl.FeatureExtraction()], {3}),
    "rates by gradient": ([ctl.AutoRGN(every=1)], {2, 3}),
    "mixout": ([ctl.Mixout(p=0.5, on="all")], {2, 3}),
    "projection": ([ctl.Projection()], {2, 3}),
    "selective decay": ([ctl.SelectiveDecay()], {2, 3}),
    "soft threshold": ([ctl.L1SP(alpha=1e-3, on="all")], {2, 3}),
}


@pytest.mark.parametrize(("strategies", "expected"), WAYS.values(), ids=WAYS)
def test_it_is_trained_only_if_it_is_named(strategies, expected):
    """Layers 0 and 1 are handed in frozen: the source is copied into them, and they stay there."""
    model = handed_in(0, 1)
    adaptation = ctl.adapt(model, source(model), strategies)
    trained = {int(name.split(".")[0]) for name in adaptation.plan.trained}
    assert trained == expected
    start = {name: t.clone() for name, t in model.state_dict().items()}
    train(adaptation)
    assert moved(adaptation, start) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= set(adaptation.plan.trained)


LORA, LHUC = ctl.LoRA(rank=2), ctl.LHUC()
ADDED = {
    "factors": ([LORA], {2}),
    "factors by name": ([ctl.LoRA(rank=2, on=["0", "2"])], {0, 2}),
    "factors everywhere": ([ctl.LoRA(rank=2, on=["*"])], {2, 3}),
    "factors in a named block": ([ctl.LoRA(rank=2, on=["1"]), ctl.SurgicalFineTuning(block="1")], {1}),
    "amplitudes": ([LHUC], {2}),
    "amplitudes by name": ([ctl.LHUC(on=["1"])], {1}),
    "amplitudes beside weights": ([ctl.LHUC(on=["*"], freeze=False)], {2, 3}),
    "a transform of the input": ([ctl.InputTransform(dim=-1)], set()),
}


@pytest.mark.parametrize(("strategies", "expected"), ADDED.values(), ids=ADDED)
def test_what_is_added_to_a_frozen_layer_changes_it_only_if_it_is_named(strategies, expected):
    """Layers 0 and 1 are handed in frozen; the exported weights of the others move."""
    model = handed_in(0, 1)
    adaptation = ctl.adapt(model, source(model), strategies)
    start = {name: t.clone() for name, t in source(network()).items()}
    train(adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1))
    after = adaptation.export().state_dict()
    assert {int(name[0]) for name in start if not torch.equal(after[name], start[name])} == expected
    assert {row.layer for row in adaptation.plan.rows if row.as_found} >= {"0", "1"} - {str(one) for one in expected}


@pytest.mark.parametrize("strategy", [LORA, LHUC])
def test_frozen_layers_get_nothing_where_others_do(strategy):
    model = handed_in(0)
    added = {row.layer for row in ctl.adapt(model, source(model), [strategy]).plan.rows if row.added}
    assert added == {"1", "2"}


@pytest.mark.parametrize(
    ("others", "trained"),
    [
        ((ctl.LayerTransfer(layers=["1"], freeze=False),), {"1"}),
        ((ctl.GradualUnfreezing(phases=[{"train": ["0"], "epochs": 1}, {"train": ["0", "1"]}]),), {"0", "1"}),
    ],
)
def test_factors_of_a_frozen_model_are_trained_where_another_strategy_names_the_layer(others, trained):
    model = network().requires_grad_(False)
    plan = ctl.adapt(model, source(model), [LORA, *others]).plan
    assert {row.layer for row in plan.rows if row.name in plan.trained} == trained
    assert set(plan.trained) <= set(plan.factors)


@pytest.mark.parametrize("strategy", [LORA, LHUC, ctl.LoRA(rank=2, on=["*"])])
def test_a_frozen_model_is_changed_by_nothing_that_is_added(strategy):
    model = network().requires_grad_(False)
    with pytest.raises(ctl.SpecError, match="8 of its 8 parameters ask for no gradient"):
        ctl.adapt(model, source(model), [strategy])
    assert len(list(model.parameters())) == 8


def test_amplitudes_of_a_frozen_norm_and_of_one_without_parameters():
    """A norm has no weight of two axes: its own parameters tell, or else its layer."""
    for affine in (True, False):
        parts = (nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 4), nn.Linear(4, 2))
        model = nn.Sequential(*parts)
        model[:2].requires_grad_(False)
        assert ctl.adapt(model, source(model), [LHUC]).plan.trained == ("2.lhuc",)


def test_factors_of_weights_that_are_frozen_alone():
    """The biases are trained by hand: nothing else of the layer is."""
    model = network()
    for layer in model[:3]:
        layer.weight.requires_grad_(False)
    with pytest.raises(ctl.SpecError, match="3 of its 8 parameters ask for no gradient"):
        ctl.adapt(model, source(model), [LORA])


def test_the_plan_says_why():
    """In the row, in the table and in its summary; a plan survives JSON."""
    model = handed_in(0)
    model[1].bias.requires_grad_(False)
    plan = ctl.adapt(model, source(model), [ctl.LayerTransfer(layers=["2"])]).plan
    assert [(row.found, row.frozen, row.as_found) for row in plan.rows if row.kind == "weight"] == [
        ("frozen", True, True),
        ("trained", False, False),
        ("trained", True, False),
        ("trained", False, False),
    ]
    states = [line.split()[3:6] for line in str(plan).splitlines()[2:6]]
    assert states[0] == ["frozen", "as", "found"]
    assert states[1][:2] == ["part", "trained"]
    assert states[2][0] == "frozen"
    assert states[2][1] != "as"
    assert "frozen as found  24 parameters in 0, 1: no gradient was asked for when handed in" in str(plan)
    assert ctl.Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_fresh_head_that_is_frozen_stays_frozen_and_a_new_one_is_trained():
    """``FeatureExtraction`` puts the head there; one that only has another shape is the user's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).requires_grad_(False)
    given = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)).state_dict()
    assert ctl.adapt(copy.deepcopy(model), given, [ctl.FeatureExtraction()]).plan.trained == ("1.weight", "1.bias")
    model[0].requires_grad_(True)
    plan = ctl.adapt(model, given).plan
    assert plan.trained == ("0.weight", "0.bias")
    assert plan["1.weight"].origin == "fresh"
    assert plan["1.weight"].as_found


class Positions(nn.Module):
    """A linear body with a fixed table, and a head; the table is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x + self.table).tanh())


@pytest.mark.parametrize("there", [True, False], ids=["in the source", "missing there"])
@pytest.mark.parametrize("rest", [[], [ctl.LayerTransfer(layers=["head"], rest="fresh")]], ids=["copied", "fresh"])
def test_a_fixed_table_keeps_its_values(there, rest):
    """Nothing initialises it again, however the rest begins, and a source model has it too."""
    model = Positions()
    given = {name: t.clone() for name, t in model.state_dict().items() if there or name != "table"}
    adaptation = ctl.adapt(model, given, [*rest, ctl.OutputConservation()], allow=["table"])
    assert torch.equal(model.table, torch.arange(4.0))
    assert torch.equal(adaptation.origin.source_model.table, torch.arange(4.0))
    train(adaptation)
    assert torch.equal(model.table, torch.arange(4.0))
    assert adaptation.plan["table"].as_found
    assert (adaptation.plan["table"].origin == "source") is there


class Distilled(nn.Module):
    """A student that keeps its teacher inside."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = network().requires_grad_(False)
        self.student = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x) - wanted


@pytest.mark.parametrize("strategies", [[], [ctl.LPFT(epochs=1)], [ctl.FeatureExtraction()]], ids=str)
def test_a_teacher_inside_is_left_alone(strategies):
    """It is not in the source, so it is fresh, but nothing that trains what is fresh trains it."""
    model = Distilled()
    given = {name: t + 0.1 for name, t in model.state_dict().items() if name.startswith("student")}
    adaptation = ctl.adapt(model, given, strategies, allow=["teacher.*"])
    before = {name: t.clone() for name, t in model.teacher.state_dict().items()}
    train(adaptation)
    assert all(torch.equal(t, before[name]) for name, t in model.teacher.state_dict().items())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert set(adaptation.plan.trained) >= {"student.3.weight", "student.3.bias"}


def test_a_norm_that_is_frozen_by_hand_keeps_its_statistics():
    """As any frozen norm does: ``requires_grad=False`` alone would leave them to drift."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    adaptation = ctl.adapt(model, source(model))
    train(adaptation, x=X + 3)
    assert torch.equal(model[0].running_mean, torch.full((4,), 0.1))
    assert not torch.equal(model[2].running_mean, torch.full((4,), 0.1))


@pytest.mark.parametrize("how", [lambda a: a, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_what_is_frozen_by_hand_later_stays_frozen(how):
    """No phase, no ``keep_frozen``, no resumed state unfreezes it; what a phase froze is trained in the next."""
    model = network()
    adaptation = ctl.adapt(model, source(model), [ctl.LPFT(epochs=1)])
    adaptation.start_phase(1)
    adaptation.model[1].requires_grad_(False)
    adaptation.start_phase(0)
    adaptation = how(adaptation)
    state = adaptation.state_dict()
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    start = {name: t.clone() for name, t in adaptation.model.state_dict().items()}
    train(adaptation, optimizer)
    adaptation.load_state_dict(state)
    adaptation.start_phase(1)
    adaptation.keep_frozen()
    assert not any(p.requires_grad for p in adaptation.model[1].parameters())
    assert moved(adaptation, start) == {0, 2, 3}


def test_fit_leaves_what_is_frozen_by_hand():
    """Before ``adapt`` or after it."""
    model = handed_in(0)
    adaptation = ctl.adapt(model, source(model), [ctl.LPFT(epochs=1), ctl.L2SP(alpha=0.1)])
    start = {name: t.clone() for name, t in model.state_dict().items()}
    model[3].requires_grad_(False)
    adaptation.start_phase(1)
    model[1].requires_grad_(False)
    adaptation.start_phase(0)
    model[3].requires_grad_(True)
    labels = torch.arange(8) % 4
    ctl.fit(adaptation, (X, labels), training=ctl.Training(epochs=3, lr=0.1, device="cpu"), seed=0)
    assert moved(adaptation, start) == {2, 3}


def test_the_next_adaptation_is_free_of_the_last_ones_freezing():
    """What a plan froze was not found frozen; what the user froze is, through both."""
    model = handed_in(0)
    ctl.adapt(model, source(model), [ctl.FeatureExtraction()])
    assert [p.requires_grad for p in model.parameters()] == [False] * 6 + [True] * 2
    plan = ctl.adapt(copy.deepcopy(model), source(model)).plan
    assert {row.layer for row in plan.rows if row.frozen} == {"0"}


@pytest.mark.parametrize("strategies", [[], [ctl.L2SP(alpha=0.1)], [ctl.FisherSP()], [ctl.WeightInterpolation()]])
def test_everything_frozen_is_refused(strategies):
    """With one sentence, before anything is copied."""
    model = network().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ctl.SpecError, match=r"8 of its 8 parameters ask for no gradient.*requires_grad_\(True\)"):
        ctl.adapt(model, source(model), strategies)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model[0].requires_grad_(True)
    with pytest.raises(ctl.SpecError, match=r"6 of its 8 .* freeze the others"):
        ctl.adapt(model, source(model), [*strategies, ctl.LayerTransfer(layers=1)])


def test_everything_frozen_is_taken_where_no_gradient_is_needed():
    """Statistics are measured, and a head is fitted."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).requires_grad_(False)
    adaptation = ctl.adapt(model, source(model), [ctl.NormAdaptation(train="nothing", statistics="target")])
    adaptation.measure([(X, torch.zeros(8)), (X + 1, torch.zeros(8))])
    torch.testing.assert_close(model[0].running_mean, X.mean(0) + 0.5)
    ctl.adapt(network().requires_grad_(False), source(network()), [ctl.FeatureExtraction(classifier="ncm")])
    with pytest.raises(ctl.SpecError, match="frozen when it was handed in"):
        ctl.adapt(model, source(model), [ctl.NormAdaptation()])
    assert ctl.adapt(model, source(model), [ctl.NormAdaptation(head=True)]).plan.trained == ("1.weight", "1.bias")


def test_integers_are_trained_by_nobody():
    """Even where their layer is named."""
    model = network()
    model[0].steps = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    adaptation = ctl.adapt(model, source(model), [ctl.LayerTransfer(layers=["0"], freeze=False)])
    row = adaptation.plan["0.steps"]
    assert (row.found, row.frozen) == ("fixed", True)
    train(adaptation)
    assert model[0].steps.tolist() == [0, 0]


class TestLowRank:
    """Adapters of peft: the base is frozen, and stays so when training is resumed from the saved model."""

    def test_a_resumed_model_keeps_its_six_trained_tensors(self):
        """Six of 14: two matrices for each of three layers."""
        peft = pytest.importorskip("peft")

        def build() -> nn.Module:
            config = peft.LoraConfig(r=2, target_modules=["0", "1", "2"])
            return peft.get_peft_model(network(), config)

        model = build()
        adaptation = ctl.adapt(model, build().state_dict(), [ctl.L2SP(alpha=0.1)])
        assert len(adaptation.plan.trained) == 6
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(adaptation)
        trained = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert trained == set(adaptation.plan.trained)
        assert all("lora_" in name for name in trained)
        resumed = ctl.adapt(build(), model.state_dict(), [ctl.L2SP(alpha=0.1)])
        assert set(resumed.plan.trained) == trained

    def test_timm_freezes(self):
        """``timm.utils.freeze`` turns the norms into constant ones, whose values are buffers then."""
        timm = pytest.importorskip("timm")
        model = timm.create_model("test_resnet", num_classes=3)
        given = {name: t.clone() for name, t in model.state_dict().items()}
        timm.utils.freeze(model, ["conv1", "bn1", "layer1"])
        adaptation = ctl.adapt(model, given)
        start = {name: t.clone() for name, t in model.state_dict().items()}
        train(adaptation, x=torch.randn(2, 3, 32, 32))
        for name, tensor in model.state_dict().items():
            held = name.startswith(("conv1", "bn1", "layer1"))
            assert torch.equal(tensor, start[name]) is held, name
            assert torch.equal(start[name], given[name]), name
