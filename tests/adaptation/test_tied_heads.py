"""A head that shares its weight with an embedding: the plan says so, and what means the head alone is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import conservtl as ctl
from conservtl.plan.table import summary


class Language(nn.Module):
    """An embedding, a layer and a head over the same words."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.norm(self.body(self.embed(words))))


def plan(*strategies: ctl.Strategy, tied: bool = True, **arguments: object) -> ctl.Plan:
    model, source = Language(tied), Language(tied)
    return ctl.adapt(model, source, strategies, head=["out"], **arguments).plan


def tied_lines(drawn: ctl.Plan) -> list[str]:
    return [line for line in summary(drawn) if line.startswith("tied")]


def test_the_plan_says_that_they_are_one_tensor():
    line = "tied  embed.weight is out.weight (the head): one tensor, with the rate, the pull and the phases of embed"
    for strategies in ((), (ctl.DiscriminativeLR(decay=0.5),), (ctl.GradualUnfreezing(),), (ctl.LPFT(),)):
        assert tied_lines(plan(*strategies)) == [line]
    assert tied_lines(plan(tied=False)) == []


def test_other_tied_tensors_come_after_the_head_and_many_are_counted():
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(5)] + [nn.Linear(3, 2)])
    for layer in layers[1:5]:
        layer.weight = layers[0].weight
    (line,) = tied_lines(ctl.adapt(layers, layers.state_dict()).plan)
    assert "0.weight is 1.weight and 2.weight and 3.weight and 4.weight: one tensor" in line
    pairs = nn.ModuleList([nn.Linear(3, 3) for _ in range(8)] + [nn.Linear(3, 2)])
    for first, second in zip(pairs[:4], pairs[4:8], strict=True):
        second.weight = first.weight
    lines = tied_lines(ctl.adapt(pairs, pairs.state_dict()).plan)
    assert [line.split()[1] for line in lines] == ["0.weight", "1.weight", "2.weight", "1"]
    assert lines[-1] == "tied  1 more tensor has several names"


@pytest.mark.parametrize("fresh", ["head", ["body", "head"], {"head": "other words"}])
def test_a_fresh_head_would_take_the_embedding_with_it(fresh):
    with pytest.raises(ctl.SpecError, match=r"one tensor with 'embed\.weight', so 'head' .* fresh=\['embed\.weight'\]"):
        plan(fresh=fresh)
    assert plan(fresh=fresh, tied=False)["out.weight"].origin == "fresh"


@pytest.mark.parametrize("fresh", ["embed", "embed.weight", "out.weight", "*"])
def test_both_are_fresh_by_a_name_of_the_tensor(fresh):
    assert "embed.weight" in plan(fresh=fresh).fresh


def test_layers_of_the_output_side_include_the_head():
    with pytest.raises(
        ctl.SpecError, match=r"the head, .*'embed\.weight', in layer 'embed' .*\['embed', 'body'\], or w"
    ):
        plan(ctl.LayerTransfer(side="output", layers=1))
    for layers, frozen in ((["body"], {"body"}), (["embed"], {"embed"})):
        drawn = plan(ctl.LayerTransfer(side="output", layers=layers))
        assert {row.layer for row in drawn.rows if row.frozen} == frozen
    assert plan(ctl.LayerTransfer(layers=1))["embed.weight"].frozen
    assert plan(ctl.LayerTransfer(side="output", layers=1), tied=False)["out.weight"].frozen


def test_both_names_move_together():
    model = Language()
    adaptation = ctl.adapt(model, Language(), [ctl.GradualUnfreezing(), ctl.L2SP()], head=["out"])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.arange(7)).square().mean().backward()
    optimizer.step()
    assert model.out.weight is model.embed.weight
    assert [name for name, value in adaptation.drift().items() if value] == ["embed"]
