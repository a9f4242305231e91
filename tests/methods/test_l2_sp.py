"""L2-SP: which parameters, how hard, and by which of its two methods."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.methods import apply_all
from conservtl.testing.choices import whole_plan


class Mixed(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.lstm = nn.LSTM(4, 3)
        self.norm = nn.LayerNorm([1, 3])  # of two dimensions, and still a norm
        self.conv = nn.Conv1d(3, 3, 3)
        self.bn = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)


WEIGHTS = {"words.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight", "head.weight"}


def deep():
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))


def pulls(strategy, model):
    return {row.name: row.pull for row in apply_all(whole_plan(model), [strategy]).rows if row.pull is not None}


def test_weights_include_embeddings_and_recurrent_matrices_but_no_norms():
    assert pulls(ctl.L2SP(alpha=0.5), Mixed()) == dict.fromkeys(WEIGHTS, 0.5)


def test_all_is_all():
    model = Mixed()
    assert set(pulls(ctl.L2SP(on="all"), model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("mode", "alpha"), [("coupled", 0.1), ("decoupled", 10.0)])
def test_two_methods_two_defaults(mode, alpha):
    plan = apply_all(whole_plan(deep()), [ctl.L2SP(mode=mode)])
    assert {row.pull for row in plan.rows if row.kind == "weight"} == {alpha}
    assert [penalty.mode for penalty in plan.penalties] == [mode]
    assert plan["0.bias"].pull is None
    assert pulls(ctl.L2SP(mode=mode, alpha=0.3), deep())["0.weight"] == 0.3


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(None, [2, 2, 2, 2, 2]), ((1, 0), [2, 1.5, 1, 0.5, 0]), ((0.1, 1), [0.2, 0.65, 1.1, 1.55, 2])],
)
def test_depth_is_linear_from_side_to_side(depth, expected):
    found = pulls(ctl.L2SP(alpha=2.0, depth=depth), deep())
    assert [found[f"{i}.weight"] for i in range(5)] == pytest.approx(expected)


def test_beta_on_what_is_fresh_alpha_on_what_is_not():
    model = deep()
    source = {name: torch.zeros(t.shape) for name, t in model.state_dict().items() if not name.startswith("4")}
    plan = ctl.adapt(model, source, [ctl.L2SP(alpha=0.5, beta=0.25)]).plan
    assert (plan["3.weight"].pull, plan["3.weight"].decay) == (0.5, None)
    assert (plan["4.weight"].pull, plan["4.weight"].decay) == (None, 0.25)
    assert (plan["4.bias"].pull, plan["4.bias"].decay) == (None, None)
    assert "4.bias" not in plan.covered


def test_zero_covers_too():
    """alpha = 0 keeps the optimizer's weight decay off, as every value of the grid does."""
    assert "0.weight" in apply_all(whole_plan(deep()), [ctl.L2SP(alpha=0.0)]).covered


def test_two_are_refused():
    with pytest.raises(ctl.PlanError, match="L2SP and L2SP both choose the pull"):
        apply_all(whole_plan(deep()), [ctl.L2SP(), ctl.L2SP(alpha=1.0, on="all")])
    with pytest.raises(ctl.PlanError, match="L2SP stands twice with the same fields"):
        apply_all(whole_plan(deep()), [ctl.L2SP(), ctl.L2SP()])


@pytest.mark.parametrize(
    "fields",
    [{"alpha": -0.1}, {"alpha": float("nan")}, {"beta": float("inf")}, {"depth": (-1, 1)}, {"mode": "both"}, {"a": 1}],
)
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.L2SP(**fields)


def test_per_parameter_is_a_mean():
    """Twice the model with the same alpha: half the pull on each of its weights."""
    small, large = pulls(ctl.L2SP(alpha=8, normalize="per_parameter"), deep()), None
    assert set(small.values()) == {8 / 20}
    large = pulls(ctl.L2SP(alpha=8, normalize="per_parameter"), nn.Sequential(deep(), deep()))
    assert set(large.values()) == {8 / 40}
    with pytest.raises(ValidationError, match="changes the scale of alpha"):
        ctl.L2SP(normalize="per_parameter")


@pytest.mark.parametrize(("mode", "alpha"), [("coupled", 0.5), ("decoupled", 5.0)])
@pytest.mark.parametrize("anchors", ["bf16", "cpu"])
def test_anchors_held_otherwise(anchors, mode, alpha):
    """On the CPU they change nothing; in bf16 they lead to the rounded source, 2^-9 of each value away at most."""
    model = nn.Sequential(nn.Linear(600, 1000), nn.Linear(1000, 2))  # one tensor beyond a chunk, one within
    source = {name: t.clone() for name, t in model.state_dict().items()}
    adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=alpha, mode=mode, anchors=anchors)])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        optimizer.step()  # no task: nothing but the pull
    for name in ("0.weight", "1.weight"):
        goal = source[name] if anchors == "cpu" else source[name].bfloat16().float()
        torch.testing.assert_close(model.state_dict()[name], goal, rtol=1e-6, atol=1e-9)
    assert (model[0].weight - source["0.weight"]).abs().le(source["0.weight"].abs() * 2**-8).all()


@pytest.mark.parametrize(
    ("anneal", "expected"),
    [
        (ctl.Anneal(steps=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (ctl.Anneal(steps=2, start=0, end=1), [0, 0.5, 1, 1, 1, 1]),
        (ctl.Anneal(steps=2, shape="sigmoid", rate=1.0), [0.8808, 0.7311, 0.5, 0.2689, 0.1192, 0.0474]),
    ],
)
def test_annealed_alpha(anneal, expected):
    """The gradient of the pull alone, step by step; a checkpoint goes on counting."""
    model = nn.Linear(1, 1, bias=False)
    adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.L2SP(alpha=2.0, anneal=anneal)])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    found = []
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(1.0)
        model.weight.grad = None
        penalty = adaptation.penalty().item()
        optimizer.step()
        found.append(1 - model.weight.item())
        assert penalty == pytest.approx(found[-1] / 0.1 / 2, abs=1e-6)
        if step == 2:
            state = adaptation.state_dict()
            adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.L2SP(alpha=2.0, anneal=anneal)])
            adaptation.load_state_dict(state)
            optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert found == pytest.approx([0.2 * factor for factor in expected], abs=1e-4)


EVERY = [ctl.L2SP(alpha=2.0, every=3), ctl.L2SP(alpha=2.0, every=3, mode="decoupled")]


@pytest.mark.parametrize("strategy", EVERY, ids=["coupled", "decoupled"])
@pytest.mark.parametrize("clipped", [False, True])
def test_every_third_step_pulls_as_much_as_three(strategy, clipped):
    """In the third step and the sixth, whatever lies between: phases, a checkpoint, clipping. No gradient but the pull.

    Coupled 1 - 3 × 0.1 × 2 of the distance is left, decoupled (1 - 0.1 × 2)^3, as three steps would leave.
    """
    model, source = nn.Linear(1, 1, bias=False), {"weight": torch.zeros(1, 1)}
    made = [strategy, ctl.GradualUnfreezing(phases=({"train": ["*"], "epochs": 1}, {"train": ["*"]}))]
    adaptation = ctl.adapt(model, source, made)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    found = []
    for step in range(7):
        model.weight.grad = torch.zeros(1, 1)
        if clipped:
            adaptation.pull()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        found.append(model.weight.item())
        if step == 1:
            adaptation.start_phase(1)
        if step == 3:
            state = adaptation.state_dict()
            adaptation = ctl.adapt(model, source, made)
            with torch.no_grad():
                model.weight.fill_(found[-1])
            adaptation.load_state_dict(state)
            optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    left = 0.4 if strategy.mode == "coupled" else 0.8**3
    assert found == pytest.approx([1, 1, left, left, left, left**2, left**2], rel=1e-6)


def test_fisher_pulls_every_third_step_too():
    """Decoupled, each element by its own share, at most to the source."""
    model = nn.Linear(1, 3, bias=False)
    strategy = ctl.FisherSP(alpha=2.0, every=3, mode="decoupled", normalize="none")
    adaptation = ctl.adapt(model, {"weight": torch.zeros(3, 1)}, [strategy])
    adaptation.use_measured("fisher", {"weight": torch.tensor([[1.0], [0.5], [9.0]])})
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(3):
        optimizer.step()
    assert model.weight.flatten().tolist() == pytest.approx([0.8**3, 0.9**3, 0.0], abs=1e-6)


def test_every_is_in_the_plan_and_validated():
    """It is printed and saved; it must be a whole number of at least 1."""
    plan = ctl.adapt(deep(), deep(), [ctl.L2SP(every=10)]).plan
    assert "every 10 steps" in str(plan)
    assert type(plan).model_validate_json(plan.model_dump_json()).penalties[0].every == 10
    assert "every" not in str(ctl.adapt(deep(), deep(), [ctl.L2SP()]).plan)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValidationError, match="every"):
            ctl.L2SP(every=wrong)


def test_a_penalty_of_your_own_acts_every_third_step():
    """By the generic kernel, which knows no quadratic form: three times its gradient."""
    from conservtl.kernels.gradient import GradientKernel
    from conservtl.methods.l2_sp import L2Penalty
    from conservtl.plan.update import Moving

    model = nn.Linear(1, 1, bias=False)
    row = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.L2SP(alpha=2.0)]).plan["weight"]
    with torch.no_grad():
        model.weight.fill_(1.0)
    moving = [Moving(row, model.weight, torch.zeros(1, 1), {"lr": 0.1})]
    GradientKernel(L2Penalty(by="x", names=("weight",), every=3), moving).add_gradients(1.0, None)
    assert model.weight.grad.item() == pytest.approx(6.0)
