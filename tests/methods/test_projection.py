"""Projection: inside the ball nothing, outside onto it; and radii learned on a validation part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

BALLS = pytest.mark.parametrize("by", ["tensor", "row"])
NORMS = pytest.mark.parametrize("norm", ["frobenius", "mars"])


def adapted(*strategies):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(8, 2))
    return ctl.adapt(model, copy.deepcopy(model), strategies)


def distance(w, w0, by, norm):
    """By the definition, row by row."""
    rows = [(a - b).flatten() for a, b in zip(w.detach(), w0, strict=True)]
    sizes = [float(row.abs().sum() if norm == "mars" else row.norm()) for row in rows]
    if by == "row":
        return sizes
    return [max(sizes) if norm == "mars" else sum(size**2 for size in sizes) ** 0.5]


@BALLS
@NORMS
@pytest.mark.parametrize("relative", [True, False])
def test_what_left_its_ball_is_on_it_and_in_the_same_direction(by, norm, relative):
    adaptation = adapted(ctl.Projection(radius=0.2, relative=relative, by=by, norm=norm))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    weight, start = adaptation.model[0].weight, adaptation.start["0.weight"]
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape))
    before = (weight - start).detach()
    optimizer.step()
    radii = [0.2 * r for r in distance(start, torch.zeros_like(start), by, norm)] if relative else None
    assert distance(weight, start, by, norm) == pytest.approx(radii or [0.2] * (4 if by == "row" else 1), rel=1e-5)
    for row, old in zip((weight - start).detach(), before, strict=True):
        assert F.cosine_similarity(row.flatten(), old.flatten(), dim=0).item() == pytest.approx(1, abs=1e-5)


@BALLS
@NORMS
def test_what_is_inside_keeps_every_bit_and_the_source_is_no_nan(by, norm):
    adaptation = adapted(ctl.Projection(radius=5.0, relative=False, by=by, norm=norm))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        adaptation.model[0].weight.add_(0.01 * torch.randn(4, 3, 3))
    before = [p.detach().clone() for p in adaptation.model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(adaptation.model.parameters(), before, strict=True))


@BALLS
@NORMS
def test_a_radius_of_zero_is_the_source(by, norm):
    adaptation = adapted(ctl.Projection(radius=0.0, by=by, norm=norm))
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    for p in adaptation.model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert torch.equal(adaptation.model[0].weight, adaptation.start["0.weight"])
    assert not torch.equal(adaptation.model[0].bias, adaptation.start["0.bias"])


class TestLearned:
    """On a loss whose best point on the way is known."""

    def objective(self, goal):
        return lambda model, _: (model.weight - goal).square().sum() + 0 * model(torch.zeros(1, 2)).sum()

    def adapted(self, **options):
        model = nn.Linear(2, 2, bias=False)
        start = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        adaptation = ctl.adapt(model, {"weight": start}, [ctl.Projection(radius="learn", **options)])
        with torch.no_grad():
            model.weight.add_(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
        return adaptation, start

    @pytest.mark.parametrize(("share", "expected"), [(0.4, 0.4), (-1.0, 0.0), (2.0, 1.0)])
    def test_it_is_the_best_point_between_the_source_and_what_was_trained(self, share, expected):
        """Beyond either end the radius stays at it."""
        adaptation, start = self.adapted(steps=200, rate=0.05)
        moved = adaptation.model.weight.detach() - start
        found = adaptation.finish(valid=[None], objective=self.objective(start + share * moved))
        torch.testing.assert_close(adaptation.model.weight.detach(), start + expected * moved, atol=0.03, rtol=0)
        radius = expected * float(moved.norm())
        assert found["learned_projection"]["radii"]["weight"] == pytest.approx(radius, abs=0.05)

    def test_rows_share_a_radius_and_the_smaller_is_left_alone(self):
        """Distances 4 and 2; the loss wants the first at 3: the second is inside."""
        adaptation, start = self.adapted(by="row", steps=300, rate=0.02)
        goal = start + torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        adaptation.finish(valid=[None], objective=self.objective(goal))
        torch.testing.assert_close(adaptation.model.weight.detach(), goal, atol=0.05, rtol=0)

    def test_the_model_is_left_as_found_but_for_its_weights(self):
        adaptation, _ = self.adapted(steps=3)
        adaptation.model.train()
        modes = []

        def objective(model, _):
            modes.append(model.training)
            return model.weight.sum()

        adaptation.finish(valid=[None], objective=objective)
        assert modes == [False] * 3
        assert adaptation.model.training
        assert adaptation.model.weight.grad is None
        assert adaptation.model.weight.requires_grad

    def test_batches_are_gone_through_again_and_none_is_an_error(self):
        adaptation, _ = self.adapted(steps=5)
        seen = []

        def objective(model, batch):
            seen.append(batch)
            return model.weight.sum()

        adaptation.finish(valid=["a", "b"], objective=objective)
        assert seen == ["a", "b", "a", "b", "a"]
        adaptation, _ = self.adapted(steps=5)
        with pytest.raises(ctl.DataError, match="no batches to learn radii on"):
            adaptation.finish(valid=[], objective=objective)

    def test_what_did_not_move_stays(self):
        model = nn.Linear(2, 2, bias=False)
        adaptation = ctl.adapt(model, {"weight": torch.ones(2, 2)}, [ctl.Projection(radius="learn", steps=3)])
        adaptation.finish(valid=[(torch.ones(2, 2), torch.tensor([0, 1]))])
        assert torch.equal(model.weight, torch.ones(2, 2))

    def test_fit_learns_on_its_validation_part(self):
        """Its labels are the source's own answers, more surely the closer: there is no reason to leave the source."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.Projection(radius="learn", on="all")])
        x = torch.randn(64, 4)
        labels = model(x).argmax(-1)
        data, valid = (x[:32], (labels[:32] + 1) % 3), (x[32:], labels[32:])
        training = ctl.Training(device="cpu", epochs=20, batch_size=16, lr=0.01)
        result = ctl.fit(adaptation, data, {"target": valid}, training, seed=0)
        radii = result.after["learned_projection"]["radii"]
        assert radii.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert max(adaptation.drift().values()) < 1.0
        assert (
            float((model(valid[0]).argmax(-1) == valid[1]).float().mean())
            == 1.0
            > result.history[-1]["target"]["accuracy"]
        )

    def test_without_a_validation_part_it_is_refused_before_training(self):
        adaptation = adapted(ctl.Projection(radius="learn"))
        before = copy.deepcopy(adaptation.model.state_dict())
        data = torch.randn(8, 3, 4), torch.zeros(8, dtype=torch.long)
        with pytest.raises(ctl.SpecError, match="Projection chooses on a validation part"):
            ctl.fit(adaptation, data)
        assert all(torch.equal(before[name], tensor) for name, tensor in adaptation.model.state_dict().items())
        with pytest.raises(ctl.SpecError, match="Projection"):
            adaptation.finish()
        with pytest.raises(ctl.SpecError, match=r"valid=batches"):
            adaptation.finish(score=lambda: 1.0)
